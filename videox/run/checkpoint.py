"""Checkpoints that survive a kill: published as a whole or not at all, found again and verified."""

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
from videox.errors import MODEL, SaveError, UserError
from videox.files import SEAL, flush, flush_tree, seal_of, temp_path, unique_path, write_json_atomically

FORMAT = 1  # of manifest.json; increased when an older videox could not resume what this one writes
MANIFEST = "manifest.json"
NUMBERED = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
HASHING_THREADS = 4  # hashing releases the GIL, and a single thread is slower than a disk

# Failures of the disk, after which all ranks can continue: OSError, and safetensors' own class for the same. Anything
# else must end the run: after a RuntimeError in a collective or an OOM this rank is not where the others are.
SAVE_ERRORS = (OSError, SafetensorError, SaveError)

Report = tuple[str, Any]  # what a rank sends to the others: its error ("" if none) and its result


# ------------------------------------------------------------------------------------------ publishing


def _attempt(work: Callable[..., Any], *arguments: object) -> Report:
    """Return the result of `work`, or its storage error, in the form in which ranks exchange it."""
    try:
        return "", work(*arguments)
    except SAVE_ERRORS as error:
        return f"{type(error).__name__}: {error}", None


def _agree(gather: Callable[[object], list[Any]], report: Report) -> list[Any]:
    """Return the results of all ranks; if one has failed, raise SaveError with the first cause on every rank."""
    reports: list[Report] = gather(report)
    for rank, (error, _) in enumerate(reports):
        if error:
            raise SaveError(error if len(reports) == 1 else f"rank {rank}: {error}")
    return [result for _, result in reports]


def _open_temporary(output_dir: Path, step: int) -> str:
    """Return the name of a new temporary folder, "" if the checkpoint already exists and is sound."""
    target = output_dir / f"checkpoint-{step}"
    if target.is_dir() and not verify(target):
        return ""
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = temp_path(target)
    folder.mkdir()
    return folder.name


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file below `folder`, by its path inside it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not visible to this process; output_dir must be shared by all machines")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush_and_hash(folder: Path, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Flush the files to the disk and return their manifest entries, hashed from what is read back."""

    def entry(name: str) -> dict[str, Any]:
        flush(folder / name)
        size = (folder / name).stat().st_size
        if size != sizes[name]:
            # A shared file system may show a rank an older state of a file that another rank wrote.
            raise OSError(f"{name} has {size} bytes here, {sizes[name]} where it was written")
        return {"size": size, "sha256": _digest(folder / name)}

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(sizes, pool.map(entry, sizes), strict=True))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _publish(
    folder: Path, step: int, files: Mapping[str, Any], world_size: int, description: Mapping[str, Any]
) -> None:
    """Write the manifest and rename the folder to its final name. A broken folder of that name is moved away first."""
    packages = {name: _installed(name) for name in ("torch", "diffusers", "accelerate", "deepspeed", "safetensors")}
    body = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "description": description,
        "versions": {"videox": __version__, **packages},
        "files": dict(sorted(files.items())),
    }
    write_json_atomically(folder / MANIFEST, {**body, SEAL: seal_of(body)})
    flush_tree(folder)
    target = folder.with_name(f"checkpoint-{step}")
    if os.path.lexists(target):
        superseded = unique_path(folder.with_name(f"superseded-{step}"))
        superseded.mkdir()
        target.rename(superseded / target.name)
    folder.rename(target)
    flush(target.parent)


@contextmanager
def publish_checkpoint(
    output_dir: Path,
    step: int,
    *,
    is_main: bool,
    gather: Callable[[object], list[Any]],
    description: Mapping[str, Any],
) -> Iterator[Path | None]:
    """Create `output_dir/checkpoint-step` from what all ranks write into the yielded folder, completely or not at all.

    The yielded folder is temporary. On exit each rank flushes and hashes a share of its files, and the ranks exchange
    the results; if all succeeded, the main rank writes the manifest, flushes the folder and renames it. Every rank
    must enter with the same step. Collectives inside the block must not depend on whether a write has failed.

    Args:
        output_dir: shared by all ranks; created if missing.
        step: optimizer steps done.
        is_main: true on exactly one rank.
        gather: returns the object of every rank, in rank order, on every rank, e.g.
            torch.distributed.all_gather_object; `lambda value: [value]` for a single process.
        description: JSON-able facts about the run, stored in the manifest (see read_manifest).

    Yields:
        The folder to write into; None on all ranks if checkpoint-step already exists and is sound: it is kept.

    Raises:
        SaveError: on every rank, with the first cause; the temporary folder is deleted, earlier checkpoints remain.
        TypeError: the description is not JSON-able.
    """
    described = json.loads(json.dumps(dict(description)))  # raises TypeError before anything is written
    token = secrets.token_hex(8)
    opened = _attempt(_open_temporary, output_dir, step) if is_main else ("", None)
    # A rank finds its own position in the gathered list by its random token.
    gathered = _agree(gather, (opened[0], (token, opened[1])))
    rank, world_size = [other for other, _ in gathered].index(token), len(gathered)
    name = next(name for _, name in gathered if name is not None)
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
        _agree(gather, written)  # files are listed only after all ranks have written
        seen = _agree(gather, _attempt(_sizes, folder))
        sizes = {file: max(listing.get(file, 0) for listing in seen) for file in set().union(*seen)}
        largest_first = sorted(sizes, key=lambda file: (-sizes[file], file))
        own = {file: sizes[file] for file in largest_first[rank::world_size]}
        entries = _agree(gather, _attempt(_flush_and_hash, folder, own))
        files = {file: entry for share in entries for file, entry in share.items()}
        done = _attempt(_publish, folder, step, files, world_size, described) if is_main else ("", None)
        _agree(gather, done)
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)  # already renamed if the save succeeded


# ------------------------------------------------------------------------------- finding and verifying


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name, oldest step first."""
    found = [path for path in output_dir.iterdir() if NUMBERED.fullmatch(path.name)] if output_dir.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=step_in_name)


def step_in_name(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name; its manifest may have another one (see latest_checkpoint)."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders named exactly `checkpoint-<step>` with a manifest, oldest step first (not verified)."""
    return [path for path in checkpoint_folders(output_dir) if (path / MANIFEST).is_file()]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest: `format`, `step`, `world_size`, `description`, `versions`, `files`.

    Raises:
        UserError: (MODEL) it is missing, damaged or of a newer format.
    """
    hint = "resume from another checkpoint"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != SEAL}
        newer = manifest["format"] > FORMAT
        sealed = manifest[SEAL] == seal_of(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        raise UserError(str(checkpoint), what, hint, MODEL) from error
    if newer:
        what = f"{MANIFEST} has format {manifest['format']}, this videox reads formats up to {FORMAT}"
        raise UserError(str(checkpoint), what, f"update videox, or {hint}", MODEL)
    if not sealed:
        raise UserError(str(checkpoint), f"{MANIFEST} is damaged: its seal does not match", hint, MODEL)
    return body


def _file_problem(path: Path, name: str, entry: Mapping[str, Any], hashes: bool) -> str:
    """Return what is wrong with one file of a manifest, "" if nothing."""
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes, the manifest has {entry['size']}"
        if name.endswith(".safetensors"):
            safe_open(path, framework="pt")
        if hashes and _digest(path) != entry["sha256"]:
            return f"{name} differs from what was saved (sha256)"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, SafetensorError) as error:
        return f"{name} cannot be read ({error})"
    return ""


def verify(checkpoint: Path, hashes: bool = False, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Return what is wrong with a checkpoint, one sentence per file; empty if it is sound.

    Args:
        checkpoint: a published folder, at any place and with any name.
        hashes: compare every byte (sha256); otherwise only the manifest, sizes and safetensors headers.
        share: (i, n): look at the i-th of n parts of the files only, which have about the same size.
    """
    try:
        files: dict[str, dict[str, Any]] = read_manifest(checkpoint)["files"]
    except UserError as error:
        return [error.what]
    strays = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if strays:
        return [f"{MANIFEST} points outside the checkpoint, to {strays[0]!r}"]
    part = sorted(files, key=lambda name: (-files[name]["size"], name))[share[0] :: share[1]]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        problems = pool.map(lambda name: _file_problem(checkpoint / name, name, files[name], hashes), sorted(part))
        return [problem for problem in problems if problem]


def latest_checkpoint(output_dir: Path, check: Callable[[Path], list[str]] = verify) -> tuple[Path | None, list[str]]:
    """Return the newest sound checkpoint (None if there is none) and a warning for each newer one that is not sound.

    Args:
        output_dir: of a run; may be missing.
        check: returns what is wrong with a checkpoint, as `verify` does.
    """
    warnings: list[str] = []
    for checkpoint in reversed(find_checkpoints(output_dir)):
        problems = check(checkpoint)
        if not problems and (step := read_manifest(checkpoint)["step"]) != step_in_name(checkpoint):
            problems = [f"it was saved as checkpoint-{step}"]
        if not problems:
            return checkpoint, warnings
        warnings.append(f"{checkpoint} is not used: {'; '.join(problems)}")
    return None, warnings
