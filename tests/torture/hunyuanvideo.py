"""Area hunyuanvideo: kills, stop signals and damaged checkpoints of HunyuanVideo runs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from tests.torture.cases import Area, Outcome, Row
from tests.torture.checkpoints import Checkpoints
from tests.torture.kills import Kills
from tests.torture.signals import Signals

FAMILY = "hunyuanvideo"


class Hunyuan(Area):
    """The areas kills, signals and checkpoints with the small HunyuanVideo."""

    rows = (
        Row("kills", "as the area kills, with and without a latent cache", 200),
        Row("signals", "as the area signals, once and twice", 100),
        Row("checkpoints", "a flipped bit, a cut, longer, missing or foreign file of a checkpoint: refused by its name", 200),
        Row("start", "the same through the train script: code 4 and one line that names the file", 100),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.kills = Kills(folder, broken=broken, family=FAMILY)
        self.signals = Signals(folder, broken=broken, family=FAMILY)
        self._checkpoints: Checkpoints | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """The area checkpoints, which begins with a run."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.folder, broken=self.broken, family=FAMILY)
        return self._checkpoints

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        row, number = self.rows[seed % len(self.rows)].name, seed // len(self.rows)
        tries = {
            "kills": lambda: self.kills.attempt(number, draw),
            "signals": lambda: self.signals.attempt(number, draw),
            "checkpoints": lambda: self.checkpoints.damaged_checkpoints(number, draw),
            "start": lambda: self.checkpoints.refused_start(number, draw),
        }
        return replace(tries[row](), row=row)
