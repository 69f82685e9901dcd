"""Serves the tests of crashes: forked children, a blow at any file operation, and small checkpoints to lose."""

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
from videox.run.checkpoint import publishing
from videox.weights.safetensors_io import save_tensors, save_weights


def alone(mine: object) -> list[object]:
    return [mine]


def fork(work: Callable[[], None]) -> int:
    """Starts `work` in a forked child, which ends with status 0, or 1 after an exception; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill(folder: Path, step: int) -> None:
    """What a small run keeps: sharded weights, optimizer state, a JSON state; all a function of the step."""
    save_weights(
        folder / "transformer", {"w": torch.full((500,), float(step)), "b": torch.ones(3)}, "{}", max_shard_size=1000
    )
    save_tensors(folder, {"w/exp_avg": torch.full((500,), step / 2)}, stem="optimizer")
    write_json_atomically(folder / "trainer_state.json", {"step": step})


def publish(output_dir: Path, step: int, **description: object) -> Path:
    with publishing(output_dir, step, is_main=True, gather=alone, description=description) as folder:
        if folder is not None:
            fill(folder, step)
    return output_dir / f"checkpoint-{step}"


def publish_all(output_dir: Path, *steps: int) -> Path:
    for step in steps:
        publish(output_dir, step)
    return output_dir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate"}


def strike(folder: Path, at: int, blow: Callable[[], None], *, reads: bool) -> list[str]:
    """Deals a blow just before the `at`-th file operation (from 1) of this process below `folder`.

    An audit hook cannot be taken back: only for forked children. With `reads`, openings to read count too (a death
    there leaves the disk as the operation before it did). Returns a list that holds the operation once it was struck.
    """
    count = 0
    struck: list[str] = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        if reads or event != "open" or arguments[2] & writing:
            count += 1
            if count == at:
                struck.append(event)
                blow()

    sys.addaudithook(hook)
    return struck


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
