"""Results of gpu.py by part, in a JSON file that an interrupted run leaves complete up to its last measurement."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu.scales import NOT_RUN, Values
from gpu.smoke import judge
from videox.errors import FLAGS, UserError
from videox.files import write_json_atomically

NOT_STARTED = "not started"
# Facts of the machine that must be equal where results are continued.
FACTS = ("device", "torch", "diffusers", "processor")
# By the column of a prediction, that of its measurement; the error is a percentage of what was measured.
COMPARED = {"predicted GiB": "peak GiB", "predicted s": "step s"}


@dataclass(frozen=True)
class Row:
    """Result of a case. seconds: total duration, with creation of the weights and warm-up."""

    section: str
    words: tuple[str, ...]
    predicted: Values
    measured: Values
    reason: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether the row shows a defect: a check or an end-to-end run that did not pass."""
        if self.section not in ("smoke", "checks"):
            return False
        if self.reason:
            return not self.reason.startswith((NOT_STARTED, NOT_RUN))
        return str(self.measured.get("result")).startswith("fail")


@dataclass
class Part:
    """Rows of a part. finished: date and time at which all of it was measured, "" = something is left."""

    rows: list[Row] = field(default_factory=list)
    finished: str = ""


class Results:
    """Results of all parts so far.

    Args:
        path: JSON file; None keeps them in memory alone.
        machine: facts about the machine.
        small: whether they are of the small size.

    Raises:
        UserError: the file has results of another machine, or is not one of these files.
    """

    def __init__(self, path: Path | None, machine: Mapping[str, Any], small: bool) -> None:
        self.path, self.machine, self.small = path, machine, small
        self.parts: dict[str, Part] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        hint = "name another file by --output, or remove this one"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, small, parts = found["machine"], found["small"], found["parts"]
            for name, part in parts.items():
                rows = [Row(**{**row, "words": tuple(row["words"])}) for row in part["rows"]]
                self.parts[name] = Part(rows, part["finished"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(str(path), f"is not a file of results ({error!r})", hint, FLAGS) from error
        differences = [
            f"{fact} {before.get(fact)}, here {self.machine.get(fact)}"
            for fact in FACTS
            if before.get(fact) != self.machine.get(fact)
        ]
        if small != self.small:
            differences.insert(
                0, f"{'small' if small else 'published'} sizes, here {'small' if self.small else 'published'}"
            )
        if differences:
            raise UserError(str(path), f"has results of {'; '.join(differences)}", hint, FLAGS)

    @property
    def rows(self) -> list[Row]:
        """The rows of all parts."""
        return [row for part in self.parts.values() for row in part.rows]

    def begin(self, name: str) -> Part:
        """Return a part to add rows to: a new one, or one that was interrupted, without rows that were not started."""
        part = self.parts.setdefault(name, Part())
        part.rows = [row for row in part.rows if not row.reason.startswith(NOT_STARTED)]
        part.finished = ""
        return part

    def add(self, row: Row) -> None:
        """Add a row to its part, with what follows from the other rows, and write the file."""
        rows = self.parts[row.section].rows
        for predicted, measured in COMPARED.items():
            if self.small and predicted == "predicted s":
                continue  # that of a GPU
            values = {**row.predicted, **row.measured}
            if values.get(predicted) and row.measured.get(measured):
                row.measured[f"{measured.split()[-1]} error %"] = 100 * (values[predicted] / values[measured] - 1)
        rows.append(row)
        if row.section == "smoke" and row.measured:
            row.measured.update(judge(row.words, row.measured, {other.words: other.measured for other in rows}))
        self.write()

    def finish(self, name: str) -> None:
        """Note that a part has ended; it is continued later if rows were not started in time."""
        part = self.parts[name]
        if not any(row.reason.startswith(NOT_STARTED) for row in part.rows):
            part.finished = time.strftime("%Y-%m-%d %H:%M")
        self.write()

    def write(self, **more: Any) -> None:  # noqa: ANN401 - JSON values
        """Write the file; more: entries beside those of the parts."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            parts = {name: asdict(part) for name, part in self.parts.items()}
            write_json_atomically(self.path, {"machine": self.machine, "small": self.small, "parts": parts, **more})


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that shows a defect."""
    return [
        f"{row.section}, {', '.join(row.words)}: {row.reason or row.measured['result']}"
        + (f" ({row.measured['figure']})" if "figure" in row.measured else "")
        for row in rows
        if row.failed
    ]
