"""The run folder: locked by one process, resumed, rewound, pruned, and cleaned of leftovers."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from videox.errors import FLAGS, MODEL, STORAGE, UserError
from videox.files import atomic_write, flush, temp_path, unique_path
from videox.run.checkpoint import (
    MANIFEST,
    checkpoint_folders,
    find_checkpoints,
    latest_checkpoint,
    read_manifest,
    step_in_name,
    verify,
)

RECORDS = (
    "metrics.jsonl",
    "validation.jsonl",
    "samples.jsonl",
    "bad_samples.jsonl",
)  # one object per line, with its `step`
BEST = re.compile(r"best-(\d+)")  # name of a folder with the exported weights of the lowest held-out loss, by step
LEFTOVER = re.compile(r"\.(tmp|trash)-.+-[0-9a-f]{12}")
FOREIGN = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler_pos_start.pkl", "pytorch_model")

# ----------------------------------------------------------------------------------------------- where to resume


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run continues.

    Attributes:
        path: the checkpoint, None = start a new run.
        step: optimizer steps done at that point.
        warnings: lines to print for the user.
    """

    path: Path | None
    step: int
    warnings: tuple[str, ...] = ()


def _foreign_files(folder: Path) -> list[str]:
    """Return the names of files that show that another trainer saved a folder."""
    return [] if (folder / MANIFEST).exists() else [name for name in FOREIGN if (folder / name).exists()]


def _foreign_error(folder: Path, found: list[str]) -> UserError:
    """Return the error for a checkpoint of another trainer."""
    hint = "convert its weights to a diffusers folder and start from that with --transformer_path"
    if (folder / "transformer").is_dir():
        hint = f"start from its weights with --transformer_path {folder / 'transformer'} and another --output_dir"
    what = f"is a checkpoint of VideoX-Fun or plain accelerate (it has {', '.join(found)} and no {MANIFEST})"
    return UserError(str(folder), what, hint, MODEL)


def _not_a_checkpoint_error(folder: Path, output_dir: Path) -> UserError:
    """Return the error for a path that is no checkpoint, with what is there and what may have been meant."""
    found = _foreign_files(folder)
    if found:
        return _foreign_error(folder, found)
    inside = find_checkpoints(folder)
    candidates = inside or find_checkpoints(output_dir)
    if inside:
        what = f"contains checkpoints ({', '.join(path.name for path in inside[-3:])}) but is not one itself"
    elif folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        what = f"is not a checkpoint: no {MANIFEST} (found: {', '.join(names[:8]) or 'nothing'})"
    else:
        what = "is a file, not a checkpoint folder" if folder.exists() else "does not exist"
    return UserError(
        str(folder),
        what,
        f"pass {candidates[-1]}" if candidates else "pass latest, or a checkpoint-<step> folder",
        MODEL,
    )


def refuse_output_dir_conflicts(
    output_dir: str,
    *,
    model: str,
    data: Path,
    parts: Mapping[str, str | None],
    data_flag: str = "train_data_dir",
) -> None:
    """Raise UserError if the output folder is a file, or the run would write into its own model or data.

    Args:
        output_dir: of the run.
        model: folder of the model; output_dir must not be it, inside it or around it.
        data: folder of the data; output_dir may be inside it.
        parts: paths to other parts of the model, by flag, None where not given; output_dir may contain them.
        data_flag: the flag that names the data.

    Raises:
        UserError: (FLAGS) with the flag that has the folder.
    """
    output, hint = Path(output_dir).resolve(), "pass a separate folder"
    given = {"pretrained_model_name_or_path": model, data_flag: data, **parts}
    for flag, path in ((flag, path) for flag, path in given.items() if path):
        source = Path(path).resolve()
        if output == source or (output in source.parents and flag not in parts):
            raise UserError("--output_dir", f"{output_dir} is or contains --{flag}", hint, FLAGS)
        if source in output.parents and flag != data_flag:
            raise UserError("--output_dir", f"{output_dir} is inside --{flag} {path}", hint, FLAGS)
    if output.exists() and not output.is_dir():
        raise UserError("--output_dir", f"{output_dir} is a file", "pass a folder", FLAGS)


def _run_marker(output_dir: Path) -> str:
    """Return the name of the file or folder that shows that a run has trained here, "" if there is none."""
    checkpoints = checkpoint_folders(output_dir)
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
    # A run that failed before its first step (e.g. because of a mistyped flag) left a status and nothing of value.
    return status.name if step else ""


def resolve_resume(resume: str | None, output_dir: Path, check: Callable[[Path], list[str]] = verify) -> ResumePoint:
    """Return where to resume. The step comes from the manifest, so renamed and moved folders work.

    Args:
        resume: "latest", a checkpoint's path (relative to the working directory or absolute), or None.
        output_dir: of this run.
        check: returns what is wrong with a checkpoint, as `verify` does.

    Raises:
        UserError: (FLAGS) `resume` is None and the folder already contains a run; (MODEL) the path is no sound
            checkpoint of this trainer, or `latest` finds checkpoints and none can be resumed; (STORAGE) a folder is
            unreadable.
    """
    try:
        if resume is None:
            return _start_anew(output_dir)
        return _resume_latest(output_dir, check) if resume == "latest" else _resume_path(resume, output_dir, check)
    except OSError as error:
        hint = "pass a path that this process may read"
        raise UserError(
            str(error.filename or output_dir), f"cannot be read ({error.strerror})", hint, STORAGE
        ) from error


def _start_anew(output_dir: Path) -> ResumePoint:
    found = _run_marker(output_dir)
    if found:
        hint = "add --resume_from_checkpoint latest to continue it, or pass another --output_dir"
        raise UserError("--output_dir", f"{output_dir} already contains a run (it has {found})", hint, FLAGS)
    return ResumePoint(None, 0)


def _resume_path(path: str, output_dir: Path, check: Callable[[Path], list[str]]) -> ResumePoint:
    checkpoint = Path(path)
    if not checkpoint.exists() and (output_dir / path / MANIFEST).is_file():
        checkpoint = output_dir / path  # a bare name, as other trainers accept it
    if not (checkpoint / MANIFEST).is_file():
        raise _not_a_checkpoint_error(checkpoint, output_dir)
    problems = check(checkpoint)
    if problems:
        raise UserError(str(checkpoint), "; ".join(problems), "pass another checkpoint, or latest", MODEL)
    return ResumePoint(checkpoint, read_manifest(checkpoint)["step"])


def _resume_latest(output_dir: Path, check: Callable[[Path], list[str]]) -> ResumePoint:
    newest, warnings = latest_checkpoint(output_dir, check)
    if newest is not None:
        return ResumePoint(newest, read_manifest(newest)["step"], tuple(warnings))
    if warnings:
        hint = "restore one of them, or pass another --output_dir to start a new run"
        raise UserError(str(output_dir), f"has no sound checkpoint: {'. '.join(warnings)}", hint, MODEL)
    for folder in reversed(checkpoint_folders(output_dir)):
        found = _foreign_files(folder)
        if found:
            raise _foreign_error(folder, found)
    return ResumePoint(None, 0, (f"there is no checkpoint in {output_dir}: a new run starts at step 0",))


def _is_later(line: bytes, step: int) -> bool:
    """Return whether a line belongs to a later step than `step`, or is incomplete."""
    try:
        record = json.loads(line)
        return bool((record.get("step") or 0) > step)
    except (ValueError, AttributeError, TypeError):
        return True


def _split_records(log: Path, moved: Path, step: int) -> None:
    """Move the later lines of a log to another file; the log is replaced only after the moved lines are on disk."""
    with atomic_write(log) as remaining:
        with log.open("rb") as lines, remaining.open("xb") as earlier, moved.open("xb") as later:
            for line in lines:
                if _is_later(line, step):
                    later.write(line)
                else:
                    earlier.write(line if line.endswith(b"\n") else line + b"\n")
        shutil.copymode(log, remaining)
        flush(moved)
        flush(moved.parent)


def rewind(output_dir: Path, step: int) -> Path | None:
    """Move what came after `step` to another folder: later checkpoints and best weights, and lines of RECORDS.

    Incomplete lines are moved, too.

    Nothing is deleted. If the process is killed at any point, a second call completes it (in a further folder).

    Args:
        output_dir: of a run that holds its lock and has no open record file.
        step: where the run continues.

    Returns:
        The folder `superseded-<step>` (`-2`, ... if that exists) with what was moved; None if nothing was later.

    Raises:
        UserError: (STORAGE) the folder cannot be written.
    """
    # Newest checkpoint first and the records last: at any moment the newest remaining checkpoint has all its records,
    # so a kill in between leaves a folder that can be resumed.
    later = [path for path in reversed(find_checkpoints(output_dir)) if step_in_name(path) > step]
    later += [folder for at, folder in best_exports(output_dir).items() if at > step]
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
        hint = "make the folder writable, or pass another --output_dir"
        raise UserError(str(output_dir), f"cannot be rewound to step {step} ({error})", hint, STORAGE) from error
    return superseded


def best_exports(output_dir: Path) -> dict[int, Path]:
    """Return the folders with exported weights of the lowest held-out loss, by their steps."""
    found = ((BEST.fullmatch(path.name), path) for path in output_dir.glob("best-*"))
    return {int(match[1]): path for match, path in found if match and path.is_dir()}


def _has_later(log: Path, step: int) -> bool:
    """Return whether a log has later lines. A complete last line that only lacks its newline gets one."""
    line = b"\n"
    with log.open("rb") as lines:
        for line in lines:
            if _is_later(line, step):
                return True
    if not line.endswith(b"\n"):
        with log.open("ab") as end:
            end.write(b"\n")
    return False


# ------------------------------------------------------------------------------------------ disk space, cleanup, lock


def _remove(folder: Path) -> list[str]:
    """Delete a folder or file that no run uses; return a warning if that fails."""
    try:
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()
    except OSError as error:
        return [f"{folder} could not be deleted ({error}); the next save tries again"]
    return []


def _leftovers(output_dir: Path, kinds: tuple[str, ...]) -> list[Path]:
    found = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    return [path for path in found if (match := LEFTOVER.fullmatch(path.name)) and match[1] in kinds]


def remove_leftovers(output_dir: Path) -> list[str]:
    """Delete temporary and discarded files of runs that were killed. Requires the run's lock (see lock_folder).

    Returns:
        A warning for each that could not be deleted.
    """
    return [warning for path in _leftovers(output_dir, ("tmp", "trash")) for warning in _remove(path)]


def prune(output_dir: Path, keep: int, spare: int | None = None) -> list[str]:
    """Delete the oldest sound checkpoints beyond the newest `keep` (at least 1); to be called after a publication.

    The checkpoint of the step `spare` is kept in addition. Broken checkpoints, links and everything that is not a
    published `checkpoint-<step>` stay untouched.

    Returns:
        A warning for each that could not be deleted; a failure never raises.
    """
    try:
        warnings = [warning for path in _leftovers(output_dir, ("trash",)) for warning in _remove(path)]
        sound = [path for path in find_checkpoints(output_dir) if not path.is_symlink() and not verify(path)]
    except OSError as error:
        return [f"{output_dir} could not be pruned ({error}); the next save tries again"]
    newest = sound[-max(keep, 1) :]
    return warnings + discard([path for path in sound if path not in newest and step_in_name(path) != spare])


def discard(folders: Sequence[Path]) -> list[str]:
    """Delete folders that the run itself wrote; those that do not exist are left out.

    Returns:
        A warning for each that could not be deleted; a failure never raises.
    """
    warnings: list[str] = []
    for folder in folders:
        # Renamed first: a folder that is only partly deleted must not have a checkpoint's name.
        trash = temp_path(folder, "trash")
        try:
            folder.rename(trash)
        except FileNotFoundError:
            continue
        except OSError as error:
            warnings.append(f"{folder} could not be deleted ({error}); the next save tries again")
            continue
        warnings += _remove(trash)
    return warnings


def require_disk_space(output_dir: Path, bytes_needed: int, what: str = "a checkpoint") -> None:
    """Raise UserError (STORAGE) if the disk of `output_dir` (which may not exist yet) lacks free space.

    Args:
        output_dir: of a run.
        bytes_needed: upper limit.
        what: what needs the space, for the message.
    """
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        found = f"{what} needs {bytes_needed / 1e9:.3g} GB of disk space, {free / 1e9:.3g} GB are free"
        raise UserError(
            str(output_dir), found, "free some disk space, or pass an --output_dir on another disk", STORAGE
        )


# File descriptors of locks. A lock lasts as long as any copy of its descriptor, so a forked worker closes its copies:
# one that outlives the trainer would keep the folder locked.
_lock_descriptors: set[int] = set()


def _forget_locks() -> None:
    while _lock_descriptors:
        os.close(_lock_descriptors.pop())


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def lock_folder(output_dir: Path) -> Iterator[list[str]]:
    """Hold the run's lock, `output_dir/.lock`, within the block. The kernel releases it however the process ends.

    Yields:
        Warnings: one if the file system does not support locks.

    Raises:
        UserError: (FLAGS) another process holds it, named by pid, host and time; (STORAGE) the folder is not writable.
    """
    path = output_dir / ".lock"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(
            str(path), f"cannot be opened ({error})", "pass an --output_dir you can write", STORAGE
        ) from error
    _lock_descriptors.add(lock)
    warnings: list[str] = []
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 4096, 0).decode(errors="replace").strip() or "another process"
            hint = "wait for that run or stop it, or pass another --output_dir"
            raise UserError("--output_dir", f"{output_dir} is in use by {owner}", hint, FLAGS) from error
        except OSError as error:
            warnings.append(
                f"{path}: this file system has no file locks ({error}); make sure that no second run writes to this folder"
            )
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on host {socket.gethostname()} since {since}\n".encode(), 0)
        yield warnings
    finally:
        if lock in _lock_descriptors:  # false in a forked child that leaves its copy of this block
            _lock_descriptors.discard(lock)
            os.close(lock)
