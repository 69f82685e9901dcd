"""Writes report.html from the files of a run: python -m videox.tracking.report OUTPUT_DIR.

A run starts this program by itself, at the lowest priority, while it trains.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

USAGE = "usage: python -m videox.tracking.report OUTPUT_DIR\n"


def main(words: Sequence[str]) -> int:
    """Write the page and return the exit code.

    Args:
        words: the output_dir; a run adds --media_seconds=N and --seconds_left=N.
    """
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    folders = [word for word in words if not word.startswith("--")]
    from videox.errors import FLAGS, STORAGE, UserError

    error = None
    if (
        len(folders) != 1
        or len(folders) + len(options) != len(words)
        or options.keys() - {"media_seconds", "seconds_left"}
    ):
        sys.stderr.write(USAGE)
        return FLAGS
    folder = Path(folders[0])
    if not any((folder / name).is_file() for name in ("args.json", "metrics.jsonl", "run_status.json")):
        error = UserError(str(folder), "is not the output_dir of a run", "pass the --output_dir of a run", FLAGS)
    else:
        from videox.tracking.report.page import write_page

        given = {name: float(value) for name, value in options.items()}
        try:
            path = write_page(folder, **given)
        except OSError as why:
            what = f"report.html cannot be written ({why.strerror})"
            error = UserError(str(folder), what, "free disk space or fix the permissions", STORAGE)
    if error is not None:
        sys.stderr.write(f"{error.line()}\n")
        return error.exit_code
    if not options:
        sys.stdout.write(f"{path} ({path.stat().st_size / 1e6:.1f} MB)\n")
    return 0


def leave(number: int, frame: FrameType | None) -> None:
    """End this program on a signal, so that unfinished files are removed."""
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    if any(word.startswith("--media_seconds") for word in sys.argv):  # started by a run, whose work comes first
        os.nice(19)
    signal.signal(signal.SIGTERM, leave)
    sys.exit(main(sys.argv[1:]))
