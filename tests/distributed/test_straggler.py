"""Tests of videox.distributed.straggler: the measured wait for the slowest rank."""

from __future__ import annotations

import json
import os
from pathlib import Path

import forkserver
import pytest
import runs
import tiny
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from videox.device import AsyncScalars, DeviceEvent
from videox.distributed.straggler import HOOKED_PARAMETERS, BackwardTimer, backward_timer, straggler_share
from videox.tracking.pending_step import PendingStep

STEPS = 4


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=64))
def test_share_is_the_mean_wait_for_the_slowest_rank(busy: list[float]) -> None:
    share = straggler_share(busy)
    waited = sum(max(busy) - each for each in busy)
    assert share == pytest.approx(waited / (len(busy) * max(busy)), abs=1e-12)
    assert -1e-12 < share < 1
    assert straggler_share([*busy, 0.0]) is None


def test_share_of_equal_ranks_is_zero() -> None:
    assert straggler_share([2.5] * 8) == 0
    assert straggler_share([3.0, 1.0]) == pytest.approx(1 / 3)
    assert straggler_share([]) is None


def test_backward_timer_stops_at_the_last_gradients() -> None:
    with runs.restored_process_state():
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(HOOKED_PARAMETERS)))
        assert backward_timer(accelerator, model) is None  # a single process waits for nobody
        timer = BackwardTimer(model, accelerator)
    begin = DeviceEvent(torch.device("cpu"))
    assert timer.take() is None
    model(torch.ones(1, 2)).sum().backward()
    after = DeviceEvent(torch.device("cpu"))
    done = timer.take()
    assert 0 <= done.since(begin) <= after.since(begin)
    assert timer.take() is None


def test_waiting_for_data_does_not_count_as_work() -> None:
    device, one = torch.device("cpu"), torch.ones(())
    times = iter([10.0, 14.0])
    begin, done = (DeviceEvent(device, lambda: next(times)) for _ in range(2))

    def step(work_done: DeviceEvent | None, waited: float) -> PendingStep:
        numbers = AsyncScalars(one, one, one > 0, device=device)
        return PendingStep(1, None, 0, None, 0.0, False, numbers, 5.0, waited, begin, work_done)  # type: ignore[arg-type]

    assert step(done, 0.0).busy() == 4
    assert step(done, 1.5).busy() == 2.5
    assert step(None, 1.5).busy() == 0
    assert step(done, 0.0).duration() == 5


# ------------------------------------------------------------------------------------------------- two processes


def train_three_times_as_busy() -> int:
    """Train as one of two ranks; rank 1 reports three times the working time of rank 0."""
    measured = PendingStep.busy

    def scaled_busy(self: PendingStep) -> float:
        assert measured(self) > 0
        return 1.0 + 2.0 * (rank == "1")

    rank = os.environ["RANK"]
    PendingStep.busy = scaled_busy
    return runs.train_script().main()


def lines_of(folder: Path, metadata: Path, work: str = "", **changes: object) -> list[dict]:
    flags = runs.wan_flags(
        tiny.build_wan_t2v(folder / "model"), metadata, folder / "run",
        **{"max_train_steps": STEPS, "checkpointing_steps": STEPS - 1, "mixed_precision": "no", **changes},
    )  # fmt: skip
    ranks = forkserver.shared().run_ranks(2, flags, folder / "log", entry_points=(work, work) if work else ())
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output()[-4000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_bytes().splitlines()]


def test_each_metrics_line_has_the_share_of_its_own_step(tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path / "data", copies=2)
    lines = lines_of(tmp_path, metadata, "tests.distributed.test_straggler:train_three_times_as_busy")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["straggler_share"] for line in lines] == pytest.approx([1 / 3] * STEPS)
    assert "waiting for the slowest rank 33% (planned " in (tmp_path / "log-rank0").read_text()


@pytest.mark.slow
def test_rank_with_more_expensive_samples_is_found(tmp_path: Path) -> None:
    """Every step has both rows: a clip on one rank, an image of a few tokens on the other."""
    metadata = tiny.make_dataset(tmp_path / "data", (("clip.mp4", 256, 256, 13, 24.0), ("image.png", 64, 64, 0, 0.0)))
    lines = lines_of(
        tmp_path, metadata, video_sample_size=256, image_sample_size=64, token_sample_size=256, balance="none",
        max_train_steps=8,
    )  # fmt: skip
    assert all(0 <= line["straggler_share"] < 1 for line in lines)
    # In the second step DDP rebuilds its buckets, for which ranks synchronize once more.
    expensive = sorted(line["straggler_share"] for line in lines[2:] if line["planned_balance"] < 0.6)
    assert len(expensive) > 1 and expensive[len(expensive) // 2] > 0.1, lines
