"""events.jsonl: a line for each launch of a run, for its end, and for its early stop.

Nothing of it is removed when a run goes back.
"""

from __future__ import annotations

import time
from pathlib import Path

from videox.tracking.jsonl import append_line

EVENTS = "events.jsonl"


def append_event(output_dir: Path, event: str, step: int, **facts: object) -> None:
    """Append {"event", "step", "time", ...} to events.jsonl; time in seconds since 1970.

    Args:
        output_dir: of the run.
        event: "launch", "end" or "early_stop".
        step: optimizer steps done.
        facts: further keys; those that are None or empty are left out.

    Raises:
        UserError: (exit code 5) the file cannot be written.
    """
    known = {name: value for name, value in facts.items() if value not in (None, "", [])}
    append_line(output_dir / EVENTS, {"event": event, "step": step, "time": round(time.time(), 3), **known})
