"""Life cycle of a run: its folder is locked, the resume point is chosen, and the status says how the run ended."""

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

from videox.errors import (
    BUG,
    INTERRUPTED,
    STOPPED,
    PeerFailed,
    SaveError,
    UserError,
    error_line,
    error_text,
    exit_code,
)
from videox.run.crash import crash_text, record_crash
from videox.run.folder import ResumePoint, lock_folder, remove_leftovers, resolve_resume
from videox.run.status import RunStatus, read_status
from videox.run.verification import SharedVerification

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Run:
    """An open run folder.

    Attributes:
        resume: where to resume.
        status: the writer of run_status.json.
        notes: lines to print for the user.
        finished_step: step at which the last run in this folder finished, 0 if it did not.
    """

    resume: ResumePoint
    status: RunStatus
    notes: tuple[str, ...]
    finished_step: int = 0


class _StatusOnError:
    """Writes into run_status.json, and crash.txt, how a block ended that an exception ended; suppresses nothing."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        with _undisturbed():
            record_crash(error, self.status.path.parent)
            code = exit_code(error)
            state = "stopped" if code in (STOPPED, INTERRUPTED) else "failed"
            self.status.write(state, exit_code=code, error=error_line(error))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Suspend handlers that raise an exception within the block, which reports how the run ended.

    These are the SIGCHLD handler of torch's DataLoader, which raises when a worker has died, and those of stop
    signals, which may come twice in quick succession, or after a failure.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: the handler was not installed from Python
                signal.signal(number, handler)


@contextmanager
def open_run(
    output_dir: Path, *, resume: str | None, verify: bool, is_main: bool, gather: Callable[[object], list[Any]]
) -> Iterator[Run]:
    """Lock the run's folder while the block runs; called on every rank, and the main rank decides for all.

    Args:
        output_dir: of the run; created if missing.
        resume: value of --resume_from_checkpoint.
        verify: check the hashes of the checkpoint; each rank hashes a share of the files.
        is_main: true on exactly one rank.
        gather: collective that returns every rank's value.

    Raises:
        UserError: on every rank: the folder is in use, belongs to another run, or the checkpoint cannot be resumed.
    """
    with ExitStack() as stack:
        checks = SharedVerification(gather, hashes=verify)
        shared: _Decision | UserError = (
            gather(_open_folder(stack, output_dir, resume, checks))[0] if is_main else checks.follow()
        )
        if isinstance(shared, UserError):
            raise shared
        status = RunStatus(output_dir, enabled=is_main)
        status.step = shared.resume.step
        stack.enter_context(_StatusOnError(status))
        status.write("running")  # inside, so that a signal meanwhile does not leave this as the last word
        yield Run(shared.resume, status, shared.notes, shared.finished_step)


class _Decision(NamedTuple):
    resume: ResumePoint
    notes: tuple[str, ...]
    finished_step: int


def _open_folder(
    stack: ExitStack, output_dir: Path, resume: str | None, checks: SharedVerification
) -> _Decision | UserError:
    try:
        notes = [*stack.enter_context(lock_folder(output_dir)), *remove_leftovers(output_dir)]
        last = read_status(output_dir)
        if last is not None and last.was_killed:
            notes.append(f"the last run here ended without writing its status (killed?) at step {last.step}")
        point = resolve_resume(resume, output_dir, checks.check)
    except UserError as error:
        # Returned, not raised: the other ranks wait in a gather and must get it, too.
        return error
    finished_step = last.step if last is not None and last.state == "finished" else 0
    return _Decision(point, (*notes, *checks.notes, *point.warnings), finished_step)


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's main function and exit with its code.

    A UserError is printed as one line, and its details below it, on stderr. So is any other exception: its traceback
    is in crash.txt of the run's folder, or is printed before the line if no folder was open.
    """
    try:
        code = main()
    except (UserError, SaveError) as error:
        sys.stderr.write(f"{error_text(error)}\n")
        code = exit_code(error)
    except PeerFailed as error:
        if error.should_print:
            sys.stderr.write(f"{error.line}\n")
        code = error.exit_code
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{error_line(error)}\n")
        code = exit_code(error)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: the exception is printed
        code = exit_code(error)
        sys.stderr.write(f"{crash_text(error) if code == BUG else error_text(error)}\n")
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:  # the process ends now, with the code that the status has
            signal.signal(number, signal.SIG_IGN)
    if dist.is_initialized():
        _leave_group(code)
    sys.exit(code)


def _leave_group(code: int) -> NoReturn:
    """End one of several processes as sys.exit does, but without finalizing the interpreter.

    gloo's threads hold the tensors of the last collectives. A thread that releases them while the interpreter is being
    finalized aborts the process, and the launcher would report a finished run as failed.
    """
    if code == 0:
        dist.destroy_process_group()  # after a failure it could wait for a process that has ended
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
