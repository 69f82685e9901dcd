"""Errors that users can fix: one line with what is wrong, the value found and how to fix it; and the exit codes."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

FLAGS = 2
DATA = 3
MODEL = 4
STORAGE = 5
NUMERICS = 6
PEER_LOST = 7
DOES_NOT_FIT = 8  # a dry run for a card that the run does not fit
BUG = 70
STOPPED = 75
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
INTERRUPTED_LINE = "interrupted outside a step; nothing was saved"
# What diffusers, transformers, safetensors and torch raise for a file or configuration that they cannot load.
LOAD_ERRORS = (
    OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError,
    MemoryError,
)  # fmt: skip

# How a disk or a file system refuses a write. A missing file and a lost connection are not among them.
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ESTALE, errno.ENXIO, errno.ENODEV,
}  # fmt: skip
PERMISSION_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS}
NAME_ERRORS = {errno.EISDIR, errno.ENOTDIR}  # a folder has the name of a file, or the other way round


class UserError(Exception):
    """An error that the user can fix; printed as one line and its details, never as a traceback.

    Args:
        where: the flag, file or row that is at fault.
        what: what is wrong, with the value found.
        hint: how to fix it, as an imperative.
        exit_code: one of the constants of this module (2 flags, 3 data, 4 model or checkpoint, 5 storage,
            6 numerics, 7 peer lost).
        details: lines that are printed below the line, such as a table of changes; run_status.json does not have them.
    """

    def __init__(self, where: str, what: str, hint: str, exit_code: int = FLAGS, details: Sequence[str] = ()) -> None:
        self.where, self.what, self.hint, self.exit_code = where, what, hint, exit_code
        self.details = tuple(details)
        super().__init__(f"{where}: {what}. Fix: {hint}.")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, int, tuple[str, ...]]]:
        # Ranks exchange their errors by pickle, which by default would call the class with the message alone.
        return UserError, (self.where, self.what, self.hint, self.exit_code, self.details)

    def line(self) -> str:
        """Return the one line for stderr and run_status.json; control characters are escaped."""
        return _printable(f"error: {self}")

    def lines(self) -> list[str]:
        """Return the line and, below it, the indented details."""
        return [self.line(), *(f"  {_printable(line)}" for line in self.details)]


def plural(count: int, one: str, several: str = "") -> str:
    """Return the word for a count, which may bring its verb: "row" or "row has" for 1, else "rows" or "rows have".

    Args:
        count: the number that is printed before it.
        one: for 1.
        several: for other numbers; "" = `one` with an s.
    """
    return one if count == 1 else several or f"{one}s"


def _one_line(text: str) -> str:
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class PeerFailed(Exception):
    """Ends a process because another process of the run failed first.

    Args:
        line: the error line of the process that failed.
        exit_code: exit code of the run.
        should_print: this process prints the line, because the one that failed could not, or printed it on another
            machine.
    """

    def __init__(self, line: str, exit_code: int, *, should_print: bool) -> None:
        self.line, self.exit_code, self.should_print = line, exit_code, should_print
        super().__init__(line)


class StopSignal(KeyboardInterrupt):
    """Ends a run that got a stop signal while no step was running; nothing is saved, the last checkpoint is kept.

    Args:
        name: of the signal, such as "SIGTERM".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class SaveError(Exception):
    """A save that did not reach the disk and was dropped as a whole; the text is the first cause. Older saves stay."""


def storage_line(error: BaseException) -> str:
    """Return the one line for an OSError by which a disk or file system refuses a write, "" for any other error.

    Most places that write cannot handle such an error. It ends the run, with this line in place of a traceback.
    """
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS | PERMISSION_ERRORS | NAME_ERRORS:
        return ""
    file = error.filename2 or error.filename
    hint = (
        "free some disk space or repair the disk, then start again; a run goes on with --resume_from_checkpoint latest"
    )
    if error.errno in PERMISSION_ERRORS:
        hint = "make it readable and writable for the user that runs this, or pass another folder"
    elif error.errno in NAME_ERRORS:
        hint = "move what has this name away, or pass another folder"
    return _one_line(f"error: {file or 'a file'}: {error.strerror or error}. Fix: {hint}.")


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an exception only means that a collective lost its connection to another process."""
    # By its name: this module does not import torch, whose torch.distributed.DistError it is.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or any(name in str(error) for name in ("gloo/", "NCCL", "ncclRemoteError"))


def exit_code(error: BaseException) -> int:
    """Return the exit code of a run that ends with this exception."""
    if isinstance(error, (UserError, PeerFailed)):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return STOPPED if isinstance(error, StopSignal) and error.name != "SIGINT" else INTERRUPTED
    return STORAGE if isinstance(error, SaveError) or storage_line(error) else BUG


def name_process(error: BaseException, rank: int) -> None:
    """Have the line of an error that ends one of several processes name it; a UserError names a flag, file or row."""
    error.process = rank  # type: ignore[attr-defined]


def error_line(error: BaseException) -> str:
    """Return the one line that reports what ended a run."""
    if isinstance(error, UserError):
        return error.line()
    if isinstance(error, PeerFailed):
        return error.line
    if isinstance(error, KeyboardInterrupt):
        if exit_code(error) == INTERRUPTED:
            return INTERRUPTED_LINE
        return f"stopped by {error} outside a step; nothing was saved, the last checkpoint is kept"
    if isinstance(error, SaveError):
        line = _one_line(f"error: {error}. Fix: free some disk space, or pass a writable folder")
    else:
        line = storage_line(error) or _one_line(f"error: {type(error).__name__}: {error}")
    process = getattr(error, "process", None)
    return line if process is None else line.replace("error: ", f"error: process {process}: ", 1)


def error_text(error: BaseException) -> str:
    """Return what is printed on stderr about the exception that ended a run: its line and its details."""
    return "\n".join(error.lines()) if isinstance(error, UserError) else error_line(error)


@contextmanager
def print_once_per_machine(environment: Mapping[str, str]) -> Iterator[None]:
    """Turn a UserError that all processes of a machine raise into a PeerFailed that one of them prints.

    Args:
        environment: the launcher's variables.

    Raises:
        PeerFailed: instead of a UserError.
    """
    try:
        yield
    except UserError as error:
        first = environment.get("LOCAL_RANK", "0") == "0"
        raise PeerFailed(error.line(), error.exit_code, should_print=first) from error
