"""Serves the run that must survive a kill: checkpoints whole or absent, found, verified, resumed and pruned."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from videox import __version__
from videox.errors import FLAGS, MODEL, STORAGE, Refusal
from videox.weights import SaveFailed, flush, flush_tree, unused

FORMAT = 1  # of manifest.json; raised when an older videox could no longer resume what this one writes
MANIFEST = "manifest.json"
RECORDS = ("metrics.jsonl", "validation.jsonl", "bad_samples.jsonl")  # one object per line, with its `step`
NUMBERED = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LEFTOVER = re.compile(r"\.(tmp|trash)-.+-[0-9a-f]{12}")
FOREIGN = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler_pos_start.pkl", "pytorch_model")
HASHING_THREADS = 4  # hashing leaves the interpreter lock, and one thread is slower than a disk

# What a save may meet: the disk (OSError; safetensors' own class for the same) and the writers of torch and DeepSpeed,
# which report a full disk as RuntimeError. Anything else is a fault of the program and is not taken for a full disk.
SAVE_ERRORS = (OSError, SafetensorError, RuntimeError, SaveFailed)

Report = tuple[str, Any]  # what a rank tells the others: its error ("" if none) and its result


def _aside_name(kind: str, name: str) -> str:
    return f".{kind}-{name}-{secrets.token_hex(6)}"


def write_json_atomically(path: Path, content: object) -> None:
    """Writes a JSON file that a reader finds whole, old or new, at any instant. Raises OSError, TypeError."""
    text = json.dumps(content, indent=1) + "\n"
    aside = path.with_name(_aside_name("tmp", path.name))
    try:
        with aside.open("x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ publishing


def _attempt(work: Callable[..., Any], *arguments: object) -> Report:
    """Returns what `work` returns, or its storage error, in the form in which ranks exchange it."""
    try:
        return "", work(*arguments)
    except SAVE_ERRORS as error:
        return f"{type(error).__name__}: {error}", None


def _agree(gather: Callable[[object], list[Any]], report: Report) -> list[Any]:
    """Returns the results of all ranks; raises SaveFailed with the first cause on every rank if one has failed."""
    reports: list[Report] = gather(report)
    for rank, (error, _) in enumerate(reports):
        if error:
            raise SaveFailed(error if len(reports) == 1 else f"rank {rank}: {error}")
    return [result for _, result in reports]


def _open_aside(output_dir: Path, step: int) -> str:
    """Returns the name of a new temporary folder, "" if the checkpoint is already there and sound."""
    target = output_dir / f"checkpoint-{step}"
    if target.is_dir() and not verify(target):
        return ""
    name = _aside_name("tmp", f"checkpoint-{step}")
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / name).mkdir()
    return name


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
        superseded = unused(folder.with_name(f"superseded-{step}"))
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
        SaveFailed: on every rank, with the first cause; the temporary folder is gone, earlier checkpoints stand.
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


def _numbered(output_dir: Path) -> list[Path]:
    """Returns the folders that carry a checkpoint's name, oldest step first."""
    found = [path for path in output_dir.iterdir() if NUMBERED.fullmatch(path.name)] if output_dir.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=_step_in_name)


def _step_in_name(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the folders named exactly `checkpoint-<step>` that hold a manifest, oldest step first (not verified)."""
    return [path for path in _numbered(output_dir) if (path / MANIFEST).is_file()]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest: `format`, `step`, `world_size`, `description`, `versions`, `files`.

    Raises:
        Refusal: (MODEL) it is absent, damaged or of a newer format.
    """
    mend = "resume from another checkpoint"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "seal"}
        newer = manifest["format"] > FORMAT
        sealed = manifest["seal"] == _seal(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        raise Refusal(str(checkpoint), what, mend, MODEL) from error
    if newer:
        what = f"{MANIFEST} has format {manifest['format']}, this videox reads up to {FORMAT}"
        raise Refusal(str(checkpoint), what, f"update videox, or {mend}", MODEL)
    if not sealed:
        raise Refusal(str(checkpoint), f"{MANIFEST} is damaged: its seal does not match", mend, MODEL)
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
    except Refusal as refusal:
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
        if not problems and (step := read_manifest(checkpoint)["step"]) != _step_in_name(checkpoint):
            problems = [f"it was saved as checkpoint-{step}"]
        if not problems:
            return checkpoint, warnings
        warnings.append(f"{checkpoint} is not used: {'; '.join(problems)}")
    return None, warnings


# -------------------------------------------------------------------------------------------- resuming


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a run goes on: the checkpoint (None = start anew), the optimizer steps behind it, and what to tell."""

    path: Path | None
    step: int
    warnings: tuple[str, ...] = ()


def _foreign(folder: Path) -> list[str]:
    """Returns the file names by which a folder shows that another trainer saved it."""
    return [] if (folder / MANIFEST).exists() else [name for name in FOREIGN if (folder / name).exists()]


def _refuse_foreign(folder: Path, found: list[str]) -> Refusal:
    mend = "convert its weights to a diffusers folder and start from that with --transformer_path"
    if (folder / "transformer").is_dir():
        mend = f"start from its weights with --transformer_path {folder / 'transformer'} and another --output_dir"
    what = f"is a checkpoint of VideoX-Fun or plain accelerate (it has {', '.join(found)} and no {MANIFEST})"
    return Refusal(str(folder), what, mend, MODEL)


def _refuse_stranger(folder: Path, output_dir: Path) -> Refusal:
    """Returns the refusal of a path that is no checkpoint: with what is there, and what could have been meant."""
    found = _foreign(folder)
    if found:
        return _refuse_foreign(folder, found)
    inside = find_checkpoints(folder)
    near = inside or find_checkpoints(output_dir)
    if inside:
        what = f"holds checkpoints ({', '.join(path.name for path in inside[-3:])}) but is none itself"
    elif folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        what = f"is no checkpoint: no {MANIFEST} (found: {', '.join(names[:8]) or 'nothing'})"
    else:
        what = "is a file, not a checkpoint folder" if folder.exists() else "does not exist"
    return Refusal(str(folder), what, f"name {near[-1]}" if near else "name a checkpoint-<step> folder", MODEL)


def _holds_a_run(output_dir: Path) -> str:
    """Returns the name of what shows that a run has trained here, "" if nothing does."""
    checkpoints = _numbered(output_dir)
    if checkpoints:
        return checkpoints[-1].name
    metrics, status = output_dir / RECORDS[0], output_dir / "run_status.json"
    if metrics.is_file() and metrics.stat().st_size:
        return metrics.name
    if not status.is_file():
        return ""
    try:
        step = json.loads(status.read_bytes())["step"]
    except (ValueError, KeyError, TypeError):
        return status.name
    # A run that failed before its first step (a mistyped flag) leaves a status and nothing to lose.
    return status.name if step else ""


def resolve_resume(resume: str | None, output_dir: Path, *, previous_run_died: bool, verify_hashes: bool) -> Resume:
    """Returns where to resume; the step comes from the manifest, so that a renamed or moved folder is honoured.

    Args:
        resume: "latest", a checkpoint's path (relative to the working directory or absolute), or None.
        output_dir: of this run.
        previous_run_died: the last run here ended without a goodbye, so that hashes are verified.
        verify_hashes: verify them in any case.

    Raises:
        Refusal: (FLAGS) `resume` is None and the folder already holds a run; (MODEL) the path is no sound checkpoint
            of ours, or `latest` finds checkpoints and none of them can be resumed; (STORAGE) a folder is unreadable.
    """
    hashes = previous_run_died or verify_hashes
    try:
        if resume is None:
            return _start_anew(output_dir)
        return _resume_latest(output_dir, hashes) if resume == "latest" else _resume_path(resume, output_dir, hashes)
    except OSError as error:
        mend = "give a path that this process may read"
        raise Refusal(
            str(error.filename or output_dir), f"cannot be read ({error.strerror})", mend, STORAGE
        ) from error


def _start_anew(output_dir: Path) -> Resume:
    found = _holds_a_run(output_dir)
    if found:
        mend = "add --resume_from_checkpoint latest to go on with it, or give another --output_dir"
        raise Refusal("--output_dir", f"{output_dir} already holds a run (it has {found})", mend, FLAGS)
    return Resume(None, 0)


def _resume_path(path: str, output_dir: Path, hashes: bool) -> Resume:
    checkpoint = Path(path)
    if not (checkpoint / MANIFEST).is_file():
        raise _refuse_stranger(checkpoint, output_dir)
    problems = verify(checkpoint, hashes)
    if problems:
        raise Refusal(str(checkpoint), "; ".join(problems), "name another checkpoint, or latest", MODEL)
    return Resume(checkpoint, read_manifest(checkpoint)["step"])


def _resume_latest(output_dir: Path, hashes: bool) -> Resume:
    newest, warnings = latest(output_dir, hashes)
    if newest is not None:
        return Resume(newest, read_manifest(newest)["step"], tuple(warnings))
    if warnings:
        mend = "restore one of them, or give another --output_dir to start anew"
        raise Refusal(str(output_dir), f"has no sound checkpoint: {'. '.join(warnings)}", mend, MODEL)
    for folder in reversed(_numbered(output_dir)):
        found = _foreign(folder)
        if found:
            raise _refuse_foreign(folder, found)
    return Resume(None, 0, (f"there is no checkpoint in {output_dir}: the run starts anew, at step 0",))


def _is_later(line: bytes, step: int) -> bool:
    """Tells whether a line belongs to a step after `step`, or is torn."""
    try:
        record = json.loads(line)
        return bool((record.get("step") or 0) > step)
    except (ValueError, AttributeError, TypeError):
        return True


def _split_records(log: Path, moved: Path, step: int) -> None:
    """Moves the later lines of a log to another file; the log is replaced at once, after the moved lines are safe."""
    kept = log.with_name(_aside_name("tmp", log.name))
    try:
        with log.open("rb") as lines, kept.open("xb") as keep, moved.open("xb") as move:
            for line in lines:
                if _is_later(line, step):
                    move.write(line)
                else:
                    keep.write(line if line.endswith(b"\n") else line + b"\n")
        shutil.copymode(log, kept)
        flush(moved)
        flush(moved.parent)
        flush(kept)
        kept.replace(log)
    finally:
        kept.unlink(missing_ok=True)


def rewind(output_dir: Path, step: int) -> Path | None:
    """Moves what came after `step` out of the way: later checkpoints, later lines of RECORDS, and torn lines.

    Nothing is deleted. Killed at any instant, a second call finishes the work (in a further folder).

    Args:
        output_dir: of a run that holds its lock and has no open record file.
        step: where the run goes on.

    Returns:
        The folder `superseded-<step>` (`-2`, ... if that exists) with what was moved; None if nothing was later.

    Raises:
        Refusal: (STORAGE) the folder cannot be written.
    """
    # Newest checkpoint first and the records last: at any instant the newest one left has all its records.
    later = [path for path in reversed(find_checkpoints(output_dir)) if _step_in_name(path) > step]
    logs = [output_dir / name for name in RECORDS if (output_dir / name).is_file()]
    try:
        logs = [log for log in logs if _has_later(log, step)]
        if not later and not logs:
            return None
        aside = unused(output_dir / f"superseded-{step}")
        aside.mkdir()
        for checkpoint in later:
            checkpoint.rename(aside / checkpoint.name)
        for log in logs:
            _split_records(log, aside / log.name, step)
        flush(aside)
        flush(output_dir)
    except OSError as error:
        mend = "make the folder writable, or give another --output_dir"
        raise Refusal(str(output_dir), f"cannot be rewound to step {step} ({error})", mend, STORAGE) from error
    return aside


def _has_later(log: Path, step: int) -> bool:
    """Tells whether a log holds later lines; a whole last line that only lacks its newline is given one."""
    line = b"\n"
    with log.open("rb") as lines:
        for line in lines:
            if _is_later(line, step):
                return True
    if not line.endswith(b"\n"):
        with log.open("ab") as end:
            end.write(b"\n")
    return False


# ------------------------------------------------------------------------------ room, order, one owner


def _remove(folder: Path) -> list[str]:
    """Deletes a folder or file that is no longer anyone's; returns a warning if it cannot be."""
    try:
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()
    except OSError as error:
        return [f"{folder} could not be removed ({error}); the next save tries again"]
    return []


def _leftovers(output_dir: Path, kinds: tuple[str, ...]) -> list[Path]:
    found = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    return [path for path in found if (match := LEFTOVER.fullmatch(path.name)) and match[1] in kinds]


def sweep(output_dir: Path) -> list[str]:
    """Removes what dead runs left behind: their temporary and discarded files. Only under the run's lock (see hold).

    Returns:
        A warning for each that could not be removed.
    """
    return [warning for path in _leftovers(output_dir, ("tmp", "trash")) for warning in _remove(path)]


def prune(output_dir: Path, keep: int) -> list[str]:
    """Removes the oldest sound checkpoints beyond the newest `keep` (at least 1); call it after a publication.

    Broken checkpoints, links and everything that is not a published `checkpoint-<step>` stay untouched.

    Returns:
        A warning for each that could not be removed; never raises for it.
    """
    try:
        warnings = [warning for path in _leftovers(output_dir, ("trash",)) for warning in _remove(path)]
        sound = [path for path in find_checkpoints(output_dir) if not path.is_symlink() and not verify(path)]
    except OSError as error:
        return [f"{output_dir} could not be pruned ({error}); the next save tries again"]
    for checkpoint in sound[: -max(keep, 1)]:
        # Renamed first: what is half removed no longer bears a checkpoint's name.
        trash = checkpoint.with_name(_aside_name("trash", checkpoint.name))
        try:
            checkpoint.rename(trash)
        except OSError as error:
            warnings.append(f"{checkpoint} could not be removed ({error}); the next save tries again")
            continue
        warnings += _remove(trash)
    return warnings


def room_for(output_dir: Path, bytes_needed: int) -> None:
    """Checks that the disk of `output_dir` (which may not exist yet) has room. Raises Refusal (STORAGE)."""
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        what = f"a checkpoint needs {bytes_needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB"
        raise Refusal(str(output_dir), what, "free some room, or give an --output_dir on another disk", STORAGE)


_held: set[int] = (
    set()
)  # descriptors of locks; a forked worker closes its copies, or it would outlive its owner's lock


def _forget_locks() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def hold(output_dir: Path) -> Iterator[list[str]]:
    """Holds the run's lock, `output_dir/.lock`, which ends with the process however that ends.

    Yields:
        Warnings: one if the file system knows no locks.

    Raises:
        Refusal: (FLAGS) another process holds it, named by pid, host and time; (STORAGE) the folder cannot be written.
    """
    path = output_dir / ".lock"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise Refusal(
            str(path), f"cannot be opened ({error})", "give an --output_dir you can write", STORAGE
        ) from error
    _held.add(lock)
    warnings: list[str] = []
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 4096, 0).decode(errors="replace").strip() or "another process"
            mend = "wait for that run or stop it, or give another --output_dir"
            raise Refusal("--output_dir", f"{output_dir} is held by {owner}", mend, FLAGS) from error
        except OSError as error:
            warnings.append(
                f"{path}: no file locks here ({error}); see to it that no second run writes to this folder"
            )
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on host {socket.gethostname()} since {since}\n".encode(), 0)
        yield warnings
    finally:
        if lock in _held:  # else this is a forked child that runs out of its copy of the block
            _held.discard(lock)
            os.close(lock)
