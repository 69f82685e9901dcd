"""What the readers of dataset configurations share: values with their place, key tables, and the lines they report."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from videox.data.index.metadata import WINDOWS_DRIVE
from videox.data.index.sources import Source
from videox.errors import DATA, UserError, plural
from videox.shapes import USUAL, snap_frames


@dataclass(frozen=True)
class KeyTable:
    """What is done with each key of a tool's dataset configuration. Every other key is reported as unknown.

    Attributes:
        tool: name of the tool.
        obeyed: keys that decide which files, captions and repeats a source has.
        shown: keys of sizes, frames and training, which are printed with the nearest flags and not taken over.
        unused: keys that have no meaning here, such as cache folders.
        refused: keys whose data would be left out of the training, with what to do instead.
    """

    tool: str
    obeyed: frozenset[str]
    shown: frozenset[str]
    unused: frozenset[str]
    refused: Mapping[str, str]

    def known(self) -> list[str]:
        """Return all keys of the table, sorted."""
        return sorted({*self.obeyed, *self.shown, *self.unused, *self.refused})


@dataclass(frozen=True)
class Entry:
    """A section of a configuration, with the sections around it as defaults.

    Attributes:
        config: the configuration file.
        name: of the section, as in "[[datasets]] 2".
        own: the section's own keys.
        inherited: keys of the sections around it, the nearest first.
    """

    config: Path
    name: str
    own: Mapping[str, Any]
    inherited: Sequence[Mapping[str, Any]] = ()

    @property
    def where(self) -> str:
        """The place of the section, for messages."""
        return f"{self.config} {self.name}".rstrip()

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - any value of a configuration file
        """Return the value of a key in the section or in the nearest section around it that has one."""
        for values in (self.own, *self.inherited):
            if values.get(key) is not None:
                return values[key]
        return default

    def fail(self, key: str, what: str, hint: str) -> NoReturn:
        """Raise the UserError (exit code 3) of one key."""
        raise UserError(f"{self.where}, key {key}", what, hint, DATA)

    def text(self, key: str, default: str = "") -> str:
        """Return a string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            self.fail(key, f"{value!r} is not a string", "put it in quotes")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"{value!r} is neither true nor false", "use one of them, without quotes")
        return value

    def number(self, key: str, default: float, low: float = 0.0) -> float:
        """Return a finite number of at least `low`."""
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < low:
            self.fail(key, f"{value!r} is not a number of at least {low:g}", "correct it")
        return float(value)

    def items(self, key: str) -> list[Any]:
        """Return a list; [] where the key is missing."""
        value = self.get(key, [])
        if not isinstance(value, list):
            self.fail(key, f"{value!r} is not a list", "put it in square brackets")
        return value

    def path(self, key: str, folders: Sequence[Path]) -> Path:
        """Return an existing file or folder; backslashes, as Windows writes them, are read as slashes.

        Args:
            key: whose value is its path.
            folders: that a relative path may be relative to, the first one that has it is used.
        """
        text = self.text(key)
        if not text:
            self.fail(key, "is missing", "add the path of the folder or list")  # "" would be the working directory
        if WINDOWS_DRIVE.match(text):
            self.fail(key, f"{text!r} is a path on a drive of Windows", "write the path that it has on this machine")
        given = [Path(form).expanduser() for form in dict.fromkeys((text, text.replace("\\", "/")))]
        candidates = [folder / path for path in given for folder in folders]
        # os.path.exists is also False for a name that is too long.
        found = next((path for path in candidates if os.path.exists(path)), None)  # noqa: PTH110
        if found is None:
            places = " nor ".join(dict.fromkeys(str(path) for path in candidates))
            self.fail(key, f"there is no {places}", "correct the path")
        return found

    def tool_path(self, key: str) -> Path:
        """Return an existing path, relative to the working directory as in the tools, or to the configuration file."""
        return self.path(key, (Path.cwd(), self.config.resolve().parent))


@dataclass
class Imported:
    """What a dataset configuration was read into.

    Attributes:
        tool: name of the format.
        sources: in the order of the file.
        shown: (section, values that are not taken over, nearest flags), for the start report.
        unused: names of keys that have no meaning here.
        unknown: sentences about unknown keys.
        remarks: further sentences.
    """

    tool: str
    sources: list[Source] = field(default_factory=list)
    shown: list[tuple[str, str, str]] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def sort_keys(self, name: str, values: Mapping[str, Any], table: KeyTable, config: Path) -> None:
        """Note the unused and unknown keys of a section.

        Args:
            name: of the section.
            values: its own keys.
            table: of the tool.
            config: the configuration file.

        Raises:
            UserError: a key is refused and has a value other than false, 0 or empty.
        """
        for key, value in values.items():
            if key in table.refused and value not in (None, False, 0, "", [], {}):
                what = f"{value!r}: {table.tool} trains with it, this trainer cannot"
                Entry(config, name, values).fail(key, what, table.refused[key])
            if key in table.unused or key in table.refused:
                self.unused[key] = None
            elif key not in table.obeyed | table.shown:
                near = difflib.get_close_matches(key, table.known(), 1)
                self.unknown.append(f"{name} {key}".strip() + (f" (did you mean {near[0]})" if near else ""))

    def show(self, entry: Entry, table: KeyTable, flags: Iterable[str]) -> None:
        """Note the values of a section that are not taken over, and the nearest flags."""
        values = {key: entry.get(key) for key in sorted(table.shown) if entry.get(key) is not None}
        self.shown.append((entry.name, ", ".join(f"{k} = {v}" for k, v in values.items()), " ".join(flags)))

    def lines(self, config: Path) -> list[str]:
        """Return lines for the start report."""
        count = len(self.sources)
        lines = [f"{config}: {count} {plural(count, 'source')}, read as {self.tool}"]
        groups: dict[tuple[str, str], list[str]] = {}
        for name, values, flags in self.shown:
            if values or flags:
                groups.setdefault((values, flags), []).append(name)
        for (values, flags), names in groups.items():
            place = "" if len(groups) == 1 else f" in {', '.join(names)}"
            what = f"not taken over{place}: {values or 'what the tool does by default'}"
            lines.append(f"  {what}; nearest flags: {flags}" if flags else f"  {what}")
        if self.unused:
            lines.append(f"  without meaning here: {', '.join(self.unused)}")
        if self.unknown:
            lines.append(f"  unknown keys, not read: {', '.join(self.unknown)}")
        return [*lines, *(f"  {remark}" for remark in dict.fromkeys(self.remarks))]


def tables(values: Any, where: str) -> list[Mapping[str, Any]]:  # noqa: ANN401 - any value of a configuration file
    """Return a list of mappings; [] for None.

    Raises:
        UserError: (DATA) it is anything else.
    """
    listed = [] if values is None else values
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise UserError(where, "is not a list of tables", "correct the file", DATA)
    return listed


def suffix_of(entry: Entry, key: str, default: str) -> tuple[str, ...]:
    """Return the suffix of caption files in lower case, with a dot."""
    suffix = entry.text(key, default).strip().lower()
    if not suffix.strip("."):
        entry.fail(key, f"{suffix!r} is not a suffix", 'use one such as ".txt"')
    return (suffix if suffix.startswith(".") else f".{suffix}",)


def side_of(size: Any) -> int:  # noqa: ANN401 - any value of a configuration file
    """Return the side of the square that has the area of a size: a side, or (width, height); 0 for anything else."""
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int | float) for side in size):
        return round(math.sqrt(size[0] * size[1]))
    return round(size) if isinstance(size, int | float) else 0


def frames_flag(frames: Any) -> list[str]:  # noqa: ANN401 - any value of a configuration file
    """Return --video_sample_n_frames for a number of frames, or the largest of several, rounded down to 4k + 1."""
    numbers = [n for n in (frames if isinstance(frames, list) else [frames]) if isinstance(n, int) and n > 0]
    return [f"--video_sample_n_frames {snap_frames(max(numbers), USUAL)}"] if numbers else []
