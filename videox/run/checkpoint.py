"""Serves the run that must survive a kill: checkpoints are published whole or not at all, found and verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from videox import __version__
from videox.errors import MODEL, UserError
from videox.files import SaveError, flush, flush_tree, temp_path, unique_path, write_json_atomically

FORMAT = 1  # of manifest.json; raised when an older videox could no longer resume what this one writes
MANIFEST = "manifest.json"
NUMBERED = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
HASHING_THREADS = 4  # hashing leaves the interpreter lock, and one thread is slower than a disk

# What a save may meet: the disk (OSError; safetensors' own class for the same). Anything else, above all a
# RuntimeError out of a collective or for want of memory, is no full disk: this process is not where the others are.
SAVE_ERRORS = (OSError, SafetensorError, SaveError)

Report = tuple[str, Any]  # what a rank tells the others: its error ("" if none) and its result


# ------------------------------------------------------------------------------------------ publishing


def _attempt(work: Callable[..., Any], *arguments: object) -> Report:
    """Returns what `work` returns, or its storage error, in the form in which ranks exchange it."""
    try:
        return "", work(*arguments)
    except SAVE_ERRORS as error:
        return f"{type(error).__name__}: {error}", None


def _agree(gather: Callable[[object], list[Any]], report: Report) -> list[Any]:
    """Returns the results of all ranks; raises SaveError with the first cause on every rank if one has failed."""
    reports: list[Report] = gather(report)
    for rank, (error, _) in enumerate(reports):
        if error:
            raise SaveError(error if len(reports) == 1 else f"rank {rank}: {error}")
    return [result for _, result in reports]


def _open_aside(output_dir: Path, step: int) -> str:
    """Returns the name of a new temporary folder, "" if the checkpoint is already there and sound."""
    target = output_dir / f"checkpoint-{step}"
    if target.is_dir() and not verify(target):
        return ""
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = temp_path(target)
    folder.mkdir()
    return folder.name


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each file below `folder`, by its path inside it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not visible to this process; output_dir must be shared by all machines")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _secure(folder: Path, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Flushes the files to the disk and returns their entries for the manifest, hashed from what is read back."""

    def entry(name: str) -> dict[str, Any]:
        flush(folder / name)
        size = (folder / name).stat().st_size
        if size != sizes[name]:
            raise OSError(f"{name} has {size} bytes here, {sizes[name]} where it was written")
        return {"size": size, "sha256": _digest(folder / name)}

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(sizes, pool.map(entry, sizes), strict=True))


def _seal(body: Mapping[str, Any]) -> str:
    """Returns the hash of a manifest's content, whatever its layout as text."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _publish(
    folder: Path, step: int, files: Mapping[str, Any], world_size: int, description: Mapping[str, Any]
) -> None:
    """Writes the manifest, then gives the folder its name. What stood there and was not sound is moved aside."""
    packages = {name: _installed(name) for name in ("torch", "diffusers", "accelerate", "deepspeed", "safetensors")}
    body = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "description": description,
        "versions": {"videox": __version__, **packages},
        "files": dict(sorted(files.items())),
    }
    write_json_atomically(folder / MANIFEST, {**body, "seal": _seal(body)})
    flush_tree(folder)
    target = folder.with_name(f"checkpoint-{step}")
    if os.path.lexists(target):
        superseded = unique_path(folder.with_name(f"superseded-{step}"))
        superseded.mkdir()
        target.rename(superseded / target.name)
    folder.rename(target)
    flush(target.parent)


@contextmanager
def publishing(
    output_dir: Path,
    step: int,
    *,
    is_main: bool,
    gather: Callable[[object], list[Any]],
    description: Mapping[str, Any],
) -> Iterator[Path | None]:
    """Makes `output_dir/checkpoint-step` out of what all ranks write into the folder given, whole or not at all.

    The folder is a temporary one. On leaving, all ranks share out its files, flush and hash them, and tell each other;
    when all went well the main rank writes the manifest, flushes the folder and renames it. Every rank must enter with
    the same step. Collectives inside the block must not depend on whether a write has failed.

    Args:
        output_dir: shared by all ranks; made if absent.
        step: optimizer steps done.
        is_main: true on exactly one rank.
        gather: the object of every rank, in rank order, on every rank, e.g. torch.distributed.all_gather_object;
            `lambda mine: [mine]` for a single process.
        description: JSON-able facts about the run, kept in the manifest (see read_manifest).

    Yields:
        The folder to write into; None on all ranks if checkpoint-step is already there and sound, which then stays.

    Raises:
        SaveError: on every rank, with the first cause; the temporary folder is gone, earlier checkpoints stand.
        TypeError: the description is not JSON-able.
    """
    described = json.loads(json.dumps(dict(description)))
    token = secrets.token_hex(8)
    opened = _attempt(_open_aside, output_dir, step) if is_main else ("", None)
    # The random token tells a rank its own place in the gathered list.
    said = _agree(gather, (opened[0], (token, opened[1])))
    rank, world_size = [mark for mark, _ in said].index(token), len(said)
    name = next(name for _, name in said if name is not None)
    if not name:
        yield None
        return
    folder = output_dir / name
    try:
        written: Report = ("", None)
        try:
            yield folder
        except SAVE_ERRORS as error:
            written = (f"{type(error).__name__}: {error}", None)
        _agree(gather, written)  # nobody looks at the files before everybody has written
        seen = _agree(gather, _attempt(_sizes, folder))
        sizes = {file: max(part.get(file, 0) for part in seen) for file in set().union(*seen)}
        largest_first = sorted(sizes, key=lambda file: (-sizes[file], file))
        mine = {file: sizes[file] for file in largest_first[rank::world_size]}
        entries = _agree(gather, _attempt(_secure, folder, mine))
        files = {file: entry for part in entries for file, entry in part.items()}
        done = _attempt(_publish, folder, step, files, world_size, described) if is_main else ("", None)
        _agree(gather, done)
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)  # renamed by now if all went well


# ------------------------------------------------------------------------------- finding and verifying


def numbered(output_dir: Path) -> list[Path]:
    """Returns the folders that carry a checkpoint's name, oldest step first."""
    found = [path for path in output_dir.iterdir() if NUMBERED.fullmatch(path.name)] if output_dir.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=step_in_name)


def step_in_name(checkpoint: Path) -> int:
    """Returns the step of a folder with a checkpoint's name; the manifest may say another (see latest)."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the folders named exactly `checkpoint-<step>` that hold a manifest, oldest step first (not verified)."""
    return [path for path in numbered(output_dir) if (path / MANIFEST).is_file()]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest: `format`, `step`, `world_size`, `description`, `versions`, `files`.

    Raises:
        UserError: (MODEL) it is absent, damaged or of a newer format.
    """
    hint = "resume from another checkpoint"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "seal"}
        newer = manifest["format"] > FORMAT
        sealed = manifest["seal"] == _seal(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        raise UserError(str(checkpoint), what, hint, MODEL) from error
    if newer:
        what = f"{MANIFEST} has format {manifest['format']}, this videox reads up to {FORMAT}"
        raise UserError(str(checkpoint), what, f"update videox, or {hint}", MODEL)
    if not sealed:
        raise UserError(str(checkpoint), f"{MANIFEST} is damaged: its seal does not match", hint, MODEL)
    return body


def _file_problem(path: Path, name: str, entry: Mapping[str, Any], hashes: bool) -> str:
    """Returns what is wrong with one file of a manifest, "" if nothing."""
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes, the manifest says {entry['size']}"
        if name.endswith(".safetensors"):
            safe_open(path, framework="pt")
        if hashes and _digest(path) != entry["sha256"]:
            return f"{name} has other content than was saved (sha256)"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, SafetensorError) as error:
        return f"{name} cannot be read ({error})"
    return ""


def verify(checkpoint: Path, hashes: bool = False) -> list[str]:
    """Returns what is wrong with a checkpoint, one sentence for each file; empty if it is sound.

    Args:
        checkpoint: a published folder, wherever it lies and whatever its name.
        hashes: compare every byte (sha256); otherwise the manifest, sizes and safetensors headers only.
    """
    try:
        files: dict[str, dict[str, Any]] = read_manifest(checkpoint)["files"]
    except UserError as refusal:
        return [refusal.what]
    strays = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if strays:
        return [f"{MANIFEST} points outside the checkpoint, to {strays[0]!r}"]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        problems = pool.map(lambda name: _file_problem(checkpoint / name, name, files[name], hashes), files)
        return [problem for problem in problems if problem]


def latest(output_dir: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """Returns the newest sound checkpoint (None without one) and a warning for each newer one that is not.

    Args:
        output_dir: of a run; may be absent.
        hashes: as for verify.
    """
    warnings: list[str] = []
    for checkpoint in reversed(find_checkpoints(output_dir)):
        problems = verify(checkpoint, hashes)
        if not problems and (step := read_manifest(checkpoint)["step"]) != step_in_name(checkpoint):
            problems = [f"it was saved as checkpoint-{step}"]
        if not problems:
            return checkpoint, warnings
        warnings.append(f"{checkpoint} is not used: {'; '.join(problems)}")
    return None, warnings
