"""Fast parts of the areas that disturb whole runs, and a broken variant of each, which must be found wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from skips import skip_missing

from tests.torture.alarms import Alarms
from tests.torture.cases import Area, Outcome, Unavailable
from tests.torture.checkpoints import Checkpoints
from tests.torture.disk import Disk
from tests.torture.experts import Experts, problems_of_stop
from tests.torture.failures import Failures
from tests.torture.hunyuanvideo import Hunyuan
from tests.torture.kills import Kills
from tests.torture.ranks import Ranks
from tests.torture.signals import Signals
from tests.torture.small_cards import SmallCards
from tests.torture.soak import Soak
from tests.torture.watchdog import Hangs

ROWS_OF_DISK = [row.name for row in Disk.rows]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        skip_missing("a C compiler", "a fault at every file call")


def attempt(kind: type[Area], folder: Path, seed: int, *, broken: bool = False, seconds: float = 0.0) -> Outcome:
    """Try a case; what it tried is more than nothing."""
    area = kind(folder, broken=broken)
    area.seconds = seconds  # of a soak
    try:
        found = area.try_case(seed)
    except Unavailable as why:
        skip_missing(why.tool, why.effect)
    assert found.tried > 0 and found.row in {row.name for row in kind.rows}
    return found


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        (Kills, 0),
        (Signals, 0),
        *((Disk, ROWS_OF_DISK.index(row)) for row in ("kill", "full")),
        *((Checkpoints, seed) for seed in (0, 3)),
        pytest.param(Soak, 0, marks=pytest.mark.slow),
        *(pytest.param(Kills, seed, marks=pytest.mark.slow) for seed in (1, 2, 4)),
        *(pytest.param(Signals, seed, marks=pytest.mark.slow) for seed in (1, 2, 3)),
        *(pytest.param(Disk, seed, marks=pytest.mark.slow) for seed in (1, 2, 4, 5, 6, 12, 13)),
        *(pytest.param(Checkpoints, seed, marks=pytest.mark.slow) for seed in (5, 9)),
        *(pytest.param(Ranks, seed, marks=pytest.mark.slow) for seed in range(6)),
        *(pytest.param(Failures, seed, marks=pytest.mark.slow) for seed in range(5)),
        *(pytest.param(Hangs, seed, marks=pytest.mark.slow) for seed in range(20)),
        pytest.param(Alarms, 0, marks=pytest.mark.slow),
        *(pytest.param(Hunyuan, seed, marks=pytest.mark.slow) for seed in range(4)),
        *(pytest.param(SmallCards, seed, marks=pytest.mark.slow) for seed in range(4)),
        *(pytest.param(Experts, seed, marks=pytest.mark.slow) for seed in range(4)),
    ],
)
def test_a_case_is_right(kind: type[Area], seed: int, tmp_path: Path) -> None:
    found = attempt(kind, tmp_path, seed)
    assert not found.problems, found


@pytest.mark.parametrize(
    ("kind", "seed", "problem"),
    [
        (Kills, 0, "optimizer.safetensors"),
        (Signals, 0, "exit code -9"),
        (Checkpoints, 0, "latest takes checkpoint-6"),
        pytest.param(Soak, 0, "open files", marks=pytest.mark.slow),
        pytest.param(Ranks, 0, "the other ranks ended with [-9]", marks=pytest.mark.slow),
        pytest.param(Failures, 0, "ended with [0, 0]", marks=pytest.mark.slow),
        pytest.param(Hangs, 0, "ended with [0, 0]", marks=pytest.mark.slow),
        pytest.param(Alarms, 0, "watchdog: process 1 on ", marks=pytest.mark.slow),
        pytest.param(Hunyuan, 0, "optimizer.safetensors", marks=pytest.mark.slow),
        pytest.param(SmallCards, 0, "metrics of step", marks=pytest.mark.slow),
        pytest.param(Experts, 0, "low_noise: metrics of step", marks=pytest.mark.slow),
    ],
)
def test_a_broken_variant_is_wrong(kind: type[Area], seed: int, problem: str, tmp_path: Path) -> None:
    found = attempt(kind, tmp_path, seed, broken=True)
    assert any(problem in line for line in found.problems), found


@pytest.mark.parametrize(
    ("states", "code", "right"),
    [
        ([], -15, True), ([], 0, False), (["stopped"], 75, True), (["stopped"], -15, False), (["finished"], 75, True),
        (["finished"], -15, True), (["finished"], 0, False), (["running"], 75, False), (["finished", "stopped"], 75, True),
        (["finished", "finished"], 0, True), (["finished", "finished"], 75, False), (["finished", "failed"], 70, False),
    ],
)  # fmt: skip
def test_how_two_runs_may_end_after_a_signal(states: list[str], code: int, right: bool, tmp_path: Path) -> None:
    for expert, state in zip(("high_noise", "low_noise"), states, strict=False):
        (tmp_path / expert).mkdir()
        (tmp_path / expert / "run_status.json").write_text(json.dumps({"state": state}), encoding="utf-8")
    run = SimpleNamespace(code=code, output=lambda: "")
    assert (problems_of_stop(run, tmp_path) == []) == right


@pytest.mark.slow
def test_a_lost_write_is_wrong(tmp_path: Path) -> None:
    """A kill whose checkpoint is then changed, and resumed without a check of hashes, is found."""
    area = Disk(tmp_path, broken=True)
    found = area.try_case(6)  # a resume, which begins with a checkpoint
    assert found.problems, found
