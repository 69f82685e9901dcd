"""Crash injection for the tests: forked children, a crash or an error at any file operation, small checkpoints."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from videox.files import write_json_atomically
from videox.run.checkpoint import publish_checkpoint
from videox.weights.safetensors_io import save_tensors, save_weights


def gather_single(value: object) -> list[object]:
    """The gather function of a run on one process."""
    return [value]


def fork(function: Callable[[], None]) -> int:
    """Call a function in a forked child, which exits with 0, or with 1 after an exception; return its pid."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def wait_for(child: int) -> int:
    """Wait for a child and return its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_checkpoint_files(folder: Path, step: int) -> None:
    """Write the files of a small checkpoint: sharded weights, optimizer state, JSON state; all depend on the step."""
    save_weights(
        folder / "transformer", {"w": torch.full((500,), float(step)), "b": torch.ones(3)}, "{}", max_shard_size=1000
    )
    save_tensors(folder, {"w/exp_avg": torch.full((500,), step / 2)}, stem="optimizer")
    write_json_atomically(folder / "trainer_state.json", {"step": step})


def publish(output_dir: Path, step: int, **description: object) -> Path:
    with publish_checkpoint(output_dir, step, is_main=True, gather=gather_single, description=description) as folder:
        if folder is not None:
            write_checkpoint_files(folder, step)
    return output_dir / f"checkpoint-{step}"


def publish_all(output_dir: Path, *steps: int) -> Path:
    for step in steps:
        publish(output_dir, step)
    return output_dir


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate"}


def inject_fault(folder: Path, at: int, fault: Callable[[], None], *, reads: bool) -> list[str]:
    """Call `fault` just before the `at`-th file operation (from 1) of this process below `folder`.

    Only for forked children, because an audit hook cannot be removed. With `reads`, opening a file to read counts too
    (a crash there leaves the disk as the previous operation did). Returns a list that contains the name of the
    operation once `fault` was called.
    """
    count = 0
    injected: list[str] = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        if reads or event != "open" or arguments[2] & writing:
            count += 1
            if count == at:
                injected.append(event)
                fault()

    sys.addaudithook(hook)
    return injected


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
