"""What an area of the torture suite is: it draws a case by its seed, tries it, and says what was wrong."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


class Unavailable(Exception):
    """A case that this machine cannot try.

    Args:
        tool: what is missing, such as "a C compiler".
        effect: what is not tested without it.
    """

    def __init__(self, tool: str, effect: str) -> None:
        self.tool, self.effect = tool, effect
        super().__init__(f"needs {tool}: {effect} is not tested")


@dataclass(frozen=True)
class Row:
    """A line of the table: its name within the area, its goal in words, and how many cases are asked."""

    name: str
    goal: str
    asked: int


@dataclass(frozen=True)
class Outcome:
    """Result of one case.

    Attributes:
        row: name of the table's row that it belongs to.
        what: what was done, in words.
        tried: units that the case tried, such as files or kills.
        problems: what was wrong, one line per unit; empty if all were right.
    """

    row: str
    what: str
    tried: int = 1
    problems: Sequence[str] = field(default_factory=tuple)


class Area(ABC):
    """One kind of fault.

    Args:
        folder: an empty folder for everything that the cases write.
        broken: break what is tested on purpose: each case must then be wrong, or it could never fail.

    Attributes:
        rows: of the table.
        seconds: time that the area has, for a case that lasts as long as it may.
    """

    rows: tuple[Row, ...]
    seconds = 60.0

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        self.folder, self.broken = folder, broken

    @abstractmethod
    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        """Try the case of this seed; `draw` depends on the area and the seed alone.

        Raises:
            Unavailable: this machine cannot try it.
        """

    def try_case(self, seed: int) -> Outcome:
        """Try the case of this seed."""
        return self.attempt(seed, random.Random(f"{type(self).__name__}:{seed}"))

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def flip_bit(path: Path, draw: random.Random, first: int = 0, every: int = 1) -> str:
    """Change one bit of a file, at byte `first` or `every` bytes later, and keep its times; return which one."""
    times, content = path.stat(), bytearray(path.read_bytes())
    at, bit = draw.randrange(first, len(content), every), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return f"bit {bit} of byte {at} of {len(content)}"
