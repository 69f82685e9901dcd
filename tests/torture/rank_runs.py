"""Runs of several ranks for the torture suite: their start, an uninterrupted run of each backend, the comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import forkserver
import launches

from tests.torture.ground import STEPS, Ground

RECIPES = ("ddp", "zero2", "zero3", "fsdp2")
KIND = "wan2.1 normal"


class RankRuns:
    """Forked ranks of the launch recipes, and their uninterrupted runs.

    Args:
        ground: model, data set and fork server.
    """

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self._references: dict[tuple[str, int], tuple[Path, float]] = {}

    def start(
        self, place: Path, recipe: str, ranks: int, entry_point: str = "",
        environment: Mapping[str, str] | None = None, **changes: object,
    ) -> list[forkserver.TrainerProcess]:  # fmt: skip
        """Fork the ranks of a run.

        Args:
            place: folder of the case.
            recipe: one of RECIPES.
            ranks: their number.
            entry_point: "module:function" that each rank calls ("" = the train script).
            environment: variables besides those of the launcher.
            changes: flags.
        """
        return self.ground.server.start_ranks(
            ranks, self.ground.flags(place, mixed_precision=None, **changes), place / "log",
            entry_points=[entry_point] * ranks if entry_point else (),
            environment={**launches.launcher_environment(recipe, KIND, ranks), **(environment or {})},
        )  # fmt: skip

    def reference(self, recipe: str, ranks: int) -> tuple[Path, float]:
        """Return the output folder of an uninterrupted run of this backend, and how many seconds it took."""
        key = recipe, ranks
        if key not in self._references:
            place, begin = self.ground.new_place(f"reference-{recipe}-{ranks}"), time.monotonic()
            run = self.start(place, recipe, ranks)
            assert [rank.wait() for rank in run] == [0] * ranks, launches.output_of(run)
            self._references[key] = place / "run", time.monotonic() - begin
        return self._references[key]

    def problems_of_resume(self, place: Path, recipe: str, ranks: int) -> list[str]:
        """Resume a run that a fault ended, and return what is not as in the uninterrupted run."""
        again = self.start(place, recipe, ranks, resume_from_checkpoint="latest")
        codes = [rank.wait() for rank in again]
        if codes != [0] * ranks:
            return [f"the resume ended with {codes}: {launches.output_of(again)}"]
        expected, output_dir = self.reference(recipe, ranks)[0], place / "run"
        found = forkserver.read_steps(output_dir)
        problems = [] if len(found) == STEPS else [f"steps {[line['step'] for line in found]}"]
        pairs = zip(forkserver.read_steps(expected), found, strict=False)
        problems += [f"metrics of step {a['step']}: {b} instead of {a}" for a, b in pairs if a != b]
        problems += [f"{path.name} is left" for path in output_dir.glob(".tmp-*")]
        return problems + different_files(output_dir / "transformer", expected / "transformer")


def different_files(folder: Path, expected: Path) -> list[str]:
    """Return the names of the files that are not equal in both folders."""
    names = {path.name for root in (folder, expected) for path in root.iterdir()}
    same = [name for name in names if (folder / name).exists() and (expected / name).exists()]
    equal = {name for name in same if (folder / name).read_bytes() == (expected / name).read_bytes()}
    return [f"transformer/{name} is not equal" for name in sorted(names - equal)]


def error_lines(ranks: Sequence[forkserver.TrainerProcess]) -> list[str]:
    """Return the error lines that these ranks have printed."""
    return [line for rank in ranks for line in rank.output().splitlines() if line.startswith("error: ")]
