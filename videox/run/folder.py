"""Serves whoever goes on with a run: its folder has one owner, is resumed from, rewound, swept and pruned."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from videox.errors import FLAGS, MODEL, STORAGE, UserError
from videox.files import atomic_write, flush, temp_path, unique_path
from videox.run.checkpoint import MANIFEST, find_checkpoints, latest, numbered, read_manifest, step_in_name, verify

RECORDS = ("metrics.jsonl", "validation.jsonl", "bad_samples.jsonl")  # one object per line, with its `step`
LEFTOVER = re.compile(r"\.(tmp|trash)-.+-[0-9a-f]{12}")
FOREIGN = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler_pos_start.pkl", "pytorch_model")

# -------------------------------------------------------------------------------------------- where to go on


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a run goes on: the checkpoint (None = start anew), the optimizer steps behind it, and what to tell."""

    path: Path | None
    step: int
    warnings: tuple[str, ...] = ()


def _foreign(folder: Path) -> list[str]:
    """Returns the file names by which a folder shows that another trainer saved it."""
    return [] if (folder / MANIFEST).exists() else [name for name in FOREIGN if (folder / name).exists()]


def _refuse_foreign(folder: Path, found: list[str]) -> UserError:
    hint = "convert its weights to a diffusers folder and start from that with --transformer_path"
    if (folder / "transformer").is_dir():
        hint = f"start from its weights with --transformer_path {folder / 'transformer'} and another --output_dir"
    what = f"is a checkpoint of VideoX-Fun or plain accelerate (it has {', '.join(found)} and no {MANIFEST})"
    return UserError(str(folder), what, hint, MODEL)


def _refuse_stranger(folder: Path, output_dir: Path) -> UserError:
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
    return UserError(str(folder), what, f"name {near[-1]}" if near else "name a checkpoint-<step> folder", MODEL)


def refuse_taken(output_dir: str, *, model: str, data: Path, parts: Mapping[str, str | None]) -> None:
    """Refuses an output folder that is a file, or where a run would write among what it is made from.

    Args:
        output_dir: of the run.
        model: folder of the model; neither it nor a folder inside or around it will do.
        data: folder of the data; a folder inside will do.
        parts: paths to other parts of the model by flag, None where there is none; a folder around them will do.

    Raises:
        UserError: (FLAGS) naming the flag that has the folder.
    """
    output, hint = Path(output_dir).resolve(), "give a folder of its own"
    given = {"pretrained_model_name_or_path": model, "train_data_dir": data, **parts}
    for flag, path in ((flag, path) for flag, path in given.items() if path):
        taken = Path(path).resolve()
        if output == taken or (output in taken.parents and flag not in parts):
            raise UserError("--output_dir", f"{output_dir} is or contains --{flag}", hint, FLAGS)
        if taken in output.parents and flag != "train_data_dir":
            raise UserError("--output_dir", f"{output_dir} is inside --{flag} {path}", hint, FLAGS)
    if output.exists() and not output.is_dir():
        raise UserError("--output_dir", f"{output_dir} is a file", "give a folder", FLAGS)


def _holds_a_run(output_dir: Path) -> str:
    """Returns the name of what shows that a run has trained here, "" if nothing does."""
    checkpoints = numbered(output_dir)
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
        UserError: (FLAGS) `resume` is None and the folder already holds a run; (MODEL) the path is no sound checkpoint
            of ours, or `latest` finds checkpoints and none of them can be resumed; (STORAGE) a folder is unreadable.
    """
    hashes = previous_run_died or verify_hashes
    try:
        if resume is None:
            return _start_anew(output_dir)
        return _resume_latest(output_dir, hashes) if resume == "latest" else _resume_path(resume, output_dir, hashes)
    except OSError as error:
        hint = "give a path that this process may read"
        raise UserError(
            str(error.filename or output_dir), f"cannot be read ({error.strerror})", hint, STORAGE
        ) from error


def _start_anew(output_dir: Path) -> Resume:
    found = _holds_a_run(output_dir)
    if found:
        hint = "add --resume_from_checkpoint latest to go on with it, or give another --output_dir"
        raise UserError("--output_dir", f"{output_dir} already holds a run (it has {found})", hint, FLAGS)
    return Resume(None, 0)


def _resume_path(path: str, output_dir: Path, hashes: bool) -> Resume:
    checkpoint = Path(path)
    if not checkpoint.exists() and (output_dir / path / MANIFEST).is_file():
        checkpoint = output_dir / path  # a bare name, as users of other trainers give it
    if not (checkpoint / MANIFEST).is_file():
        raise _refuse_stranger(checkpoint, output_dir)
    problems = verify(checkpoint, hashes)
    if problems:
        raise UserError(str(checkpoint), "; ".join(problems), "name another checkpoint, or latest", MODEL)
    return Resume(checkpoint, read_manifest(checkpoint)["step"])


def _resume_latest(output_dir: Path, hashes: bool) -> Resume:
    newest, warnings = latest(output_dir, hashes)
    if newest is not None:
        return Resume(newest, read_manifest(newest)["step"], tuple(warnings))
    if warnings:
        hint = "restore one of them, or give another --output_dir to start anew"
        raise UserError(str(output_dir), f"has no sound checkpoint: {'. '.join(warnings)}", hint, MODEL)
    for folder in reversed(numbered(output_dir)):
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
    with atomic_write(log) as kept:
        with log.open("rb") as lines, kept.open("xb") as keep, moved.open("xb") as move:
            for line in lines:
                if _is_later(line, step):
                    move.write(line)
                else:
                    keep.write(line if line.endswith(b"\n") else line + b"\n")
        shutil.copymode(log, kept)
        flush(moved)
        flush(moved.parent)


def rewind(output_dir: Path, step: int) -> Path | None:
    """Moves what came after `step` out of the way: later checkpoints, later lines of RECORDS, and torn lines.

    Nothing is deleted. Killed at any instant, a second call finishes the work (in a further folder).

    Args:
        output_dir: of a run that holds its lock and has no open record file.
        step: where the run goes on.

    Returns:
        The folder `superseded-<step>` (`-2`, ... if that exists) with what was moved; None if nothing was later.

    Raises:
        UserError: (STORAGE) the folder cannot be written.
    """
    # Newest checkpoint first and the records last: at any instant the newest one left has all its records.
    later = [path for path in reversed(find_checkpoints(output_dir)) if step_in_name(path) > step]
    logs = [output_dir / name for name in RECORDS if (output_dir / name).is_file()]
    try:
        logs = [log for log in logs if _has_later(log, step)]
        if not later and not logs:
            return None
        superseded = unique_path(output_dir / f"superseded-{step}")
        superseded.mkdir()
        for checkpoint in later:
            checkpoint.rename(superseded / checkpoint.name)
        for log in logs:
            _split_records(log, superseded / log.name, step)
        flush(superseded)
        flush(output_dir)
    except OSError as error:
        hint = "make the folder writable, or give another --output_dir"
        raise UserError(str(output_dir), f"cannot be rewound to step {step} ({error})", hint, STORAGE) from error
    return superseded


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


# ------------------------------------------------------------------------------------- room, order, one owner


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
        trash = temp_path(checkpoint, "trash")
        try:
            checkpoint.rename(trash)
        except OSError as error:
            warnings.append(f"{checkpoint} could not be removed ({error}); the next save tries again")
            continue
        warnings += _remove(trash)
    return warnings


def room_for(output_dir: Path, bytes_needed: int, what: str = "a checkpoint") -> None:
    """Checks that the disk of `output_dir` (which may not exist yet) has room. Raises UserError (STORAGE).

    Args:
        output_dir: of a run.
        bytes_needed: at most.
        what: needs it, for the message.
    """
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        found = f"{what} needs {bytes_needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB"
        raise UserError(str(output_dir), found, "free some room, or give an --output_dir on another disk", STORAGE)


# Descriptors of locks; a forked worker closes its copies, or it would outlive its owner's lock.
_held: set[int] = set()


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
        UserError: (FLAGS) another process holds it, named by pid, host and time; (STORAGE) the folder cannot be written.
    """
    path = output_dir / ".lock"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(
            str(path), f"cannot be opened ({error})", "give an --output_dir you can write", STORAGE
        ) from error
    _held.add(lock)
    warnings: list[str] = []
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 4096, 0).decode(errors="replace").strip() or "another process"
            hint = "wait for that run or stop it, or give another --output_dir"
            raise UserError("--output_dir", f"{output_dir} is held by {owner}", hint, FLAGS) from error
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
