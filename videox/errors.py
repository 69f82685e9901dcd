"""Serves the user who has to mend something: one line with what is wrong, the value found and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

FLAGS = 2
DATA = 3
MODEL = 4
STORAGE = 5
NUMERICS = 6
PEER_LOST = 7
BUG = 70
STOPPED = 75
# What diffusers, transformers, safetensors and torch raise on a file or configuration that they cannot use.
UNLOADABLE = (OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError)


class UserError(Exception):
    """A stop that a person can act on; printed as one line, never as a traceback.

    Args:
        where: the flag, file or row that is at fault.
        what: what is wrong, with the value found.
        mend: the way out, as an imperative.
        exit_code: one of the constants of this module (2 flags, 3 data, 4 model or checkpoint, 5 storage,
            6 numerics, 7 peer lost).
    """

    def __init__(self, where: str, what: str, hint: str, exit_code: int = FLAGS) -> None:
        self.where, self.what, self.hint, self.exit_code = where, what, hint, exit_code
        super().__init__(f"{where}: {what}. Fix: {hint}.")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, int]]:
        return UserError, (self.where, self.what, self.hint, self.exit_code)  # ranks tell each other their refusals

    def line(self) -> str:
        """Returns the one line for stderr and run_status.json; control characters are escaped."""
        text = f"error: {self}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class PeerFailed(Exception):
    """What ends a process because another one of the run failed first.

    Args:
        line: of the process that failed.
        exit_code: that the run ends with.
        say: whether this process prints the line: the one that failed could not, or did on another machine.
    """

    def __init__(self, line: str, exit_code: int, *, say: bool) -> None:
        self.line, self.exit_code, self.say = line, exit_code, say
        super().__init__(line)


@contextmanager
def told_once(environment: Mapping[str, str]) -> Iterator[None]:
    """Has one process of each machine print what all of its processes find out.

    Args:
        environment: the launcher's variables.

    Raises:
        PeerFailed: in place of a UserError.
    """
    try:
        yield
    except UserError as refusal:
        first = environment.get("LOCAL_RANK", "0") == "0"
        raise PeerFailed(refusal.line(), refusal.exit_code, say=first) from refusal
