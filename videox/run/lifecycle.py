"""Serves a run from its lock to its goodbye: one owner, one way to resume, and a status that says how it ended."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from videox.errors import BUG, STORAGE, PeerFailed, UserError
from videox.files import SaveError
from videox.run.folder import Resume, hold, resolve_resume, sweep
from videox.run.status import RunStatus, read_status

INTERRUPTED = 130  # as shells tell a SIGINT
OUTSIDE = "interrupted outside a step; nothing was saved"


@dataclass(frozen=True)
class Run:
    """An open run folder: where to resume, the status to keep, what the user should hear.

    finished_step: the step at which the last run here finished, 0 if it did not.
    """

    resume: Resume
    status: RunStatus
    notes: tuple[str, ...]
    finished_step: int = 0


class _Recorded:
    """Writes into run_status.json how a block ended, if it ended by an exception; hides nothing."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status

    def __enter__(self) -> None:
        self.status.write("running")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        with _undisturbed():
            if isinstance(error, KeyboardInterrupt):
                self.status.write("stopped", exit_code=INTERRUPTED, error=OUTSIDE)
            else:
                self.status.write("failed", exit_code=exit_code(error), error=one_line(error))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps torch's loader, whose handler of SIGCHLD raises when a worker has died, from doing so within a block."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # None: set by who knows no Python
            signal.signal(signal.SIGCHLD, before)


@contextmanager
def open_run(
    output_dir: Path, *, resume: str | None, verify: bool, is_main: bool, gather: Callable[[object], list[Any]]
) -> Iterator[Run]:
    """Holds the run's folder while the block runs; every process calls it, the main one decides for all.

    Args:
        output_dir: of the run; made when missing.
        resume: what --resume_from_checkpoint says.
        verify: check all hashes even if the last run ended well.
        is_main: on one process only.
        gather: collective that returns every process's value.

    Raises:
        UserError: on every process: the folder is in use, holds another run, or the checkpoint cannot be resumed.
    """
    with ExitStack() as stack:
        decision = _open_folder(stack, output_dir, resume, verify) if is_main else None
        shared: _Decision | UserError = gather(decision)[0]
        if isinstance(shared, UserError):
            raise shared
        status = RunStatus(output_dir, enabled=is_main)
        status.step = shared.resume.step
        stack.enter_context(_Recorded(status))
        yield Run(shared.resume, status, shared.notes, shared.finished_step)


class _Decision(NamedTuple):
    resume: Resume
    notes: tuple[str, ...]
    finished_step: int


def _open_folder(stack: ExitStack, output_dir: Path, resume: str | None, verify: bool) -> _Decision | UserError:
    try:
        notes = [*stack.enter_context(hold(output_dir)), *sweep(output_dir)]
        last = read_status(output_dir)
        died = last is not None and last.died
        if died and last is not None:
            notes.append(f"the last run here died without a goodbye at step {last.step}")
        found = resolve_resume(resume, output_dir, previous_run_died=died, verify_hashes=verify)
    except UserError as refusal:
        return refusal
    finished_step = last.step if last is not None and last.state == "finished" else 0
    return _Decision(found, (*notes, *found.warnings), finished_step)


def main_first(work: Callable[[], object], *, is_main: bool, gather: Callable[[object], list[Any]]) -> None:
    """Runs `work` on the main process while the others wait; a UserError of it is raised on every process."""
    refusal: UserError | None = None
    if is_main:
        try:
            work()
        except UserError as found:
            refusal = found
    refusal = gather(refusal)[0]
    if refusal is not None:
        raise refusal


def together(work: Callable[[], object], *, gather: Callable[[object], list[Any]]) -> None:
    """Runs `work` on every process; a UserError of any of them is raised on all."""
    refusal: UserError | None = None
    try:
        work()
    except UserError as found:
        refusal = found
    refusals = [found for found in gather(refusal) if found is not None]
    if refusals:
        raise refusals[0]


def exit_code(error: BaseException) -> int:
    """Returns the exit code that an exception ends a run with (see videox.errors)."""
    if isinstance(error, (UserError, PeerFailed)):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return STORAGE if isinstance(error, SaveError) else BUG


def one_line(error: BaseException) -> str:
    """Returns the one line that tells a person what ended a run."""
    if isinstance(error, UserError):
        return error.line()
    if isinstance(error, PeerFailed):
        return error.line
    if isinstance(error, KeyboardInterrupt):
        return OUTSIDE
    if isinstance(error, SaveError):
        return " ".join(f"error: {error}. Fix: free some room, or give a folder that takes it".split())
    return " ".join(f"error: {type(error).__name__}: {error}".split())


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs a script's main and exits with its code; a UserError is one line on stderr, the rest keep their traceback."""
    try:
        code = main()
    except (UserError, SaveError) as error:
        sys.stderr.write(f"{one_line(error)}\n")
        code = exit_code(error)
    except PeerFailed as error:
        if error.say:
            sys.stderr.write(f"{error.line}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted outside a step; the last checkpoint stands\n")
        code = INTERRUPTED
    if dist.is_initialized():
        _leave_group(code)
    sys.exit(code)


def _leave_group(code: int) -> NoReturn:
    """Ends one of several processes as sys.exit does, except that the interpreter is not taken down first.

    gloo's threads hold the tensors of the last collectives. One that lets go of them while the interpreter is taken
    down aborts the process, and the launcher takes a run that has finished for one that has failed.
    """
    if code == 0:
        dist.destroy_process_group()  # after a failure it could wait for a process that will not come
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
