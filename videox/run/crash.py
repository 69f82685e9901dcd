"""crash.txt: tracebacks of errors that no message was written for, in the folder of the run that they ended."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

from videox.errors import BUG, error_line, exit_code

CRASH = "crash.txt"
_NOTE = "traceback: "


def record_crash(error: BaseException, output_dir: Path) -> None:
    """Append the traceback of an unforeseen error to `output_dir`/crash.txt, and note the place in the error.

    Errors that have a message for the user are left alone: their line says everything. If the file cannot be written,
    the error gets no note, and `crash_text` returns the traceback itself.

    Args:
        error: what ended the run.
        output_dir: folder of the run.
    """
    if exit_code(error) != BUG or not isinstance(error, Exception):
        return
    process = os.environ.get("RANK", "0")
    head = f"==== {time.strftime('%Y-%m-%d %H:%M:%S')}, process {process} (PID {os.getpid()})\n"
    try:
        with (output_dir / CRASH).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(head + "".join(traceback.format_exception(error)) + "\n")
    except OSError:
        return
    error.add_note(f"{_NOTE}{output_dir / CRASH}")


def crash_text(error: BaseException) -> str:
    """Return what is printed on stderr about an unforeseen error: its line, and its traceback or where that is."""
    place = next((note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)), None)
    if place is not None:
        return f"{error_line(error)}\n  {place}"
    return "".join(traceback.format_exception(error)) + error_line(error)
