"""Tests of videox.estimate.epoch_time: an epoch's time from its micro-batches, and the lines that report it."""

from __future__ import annotations

import pytest
from steps import step_of

from videox.estimate.epoch_time import EpochTime, FlagGain, epoch_time, gain_lines, limit_words, step_time_lines
from videox.estimate.step_time import Parts
from videox.shapes import Bucket, token_count

CLIP, IMAGE = Bucket(81, 480, 832), Bucket(1, 256, 256)
MICRO_BATCHES = {(CLIP, 1): 6, (IMAGE, 2): 4, (CLIP, 2): 2}
ALL = range(30)


def epoch(balance: float = 1.0, processes: int = 2) -> EpochTime:
    step = step_of("wan2.1-t2v-1.3b", backend="ddp", processes=processes, per_host=8)
    return epoch_time(step, MICRO_BATCHES, lambda tokens: (ALL if tokens > 1000 else (), ""), 3, balance)


def test_a_step_is_the_mean_of_the_micro_batches_and_the_optimizer() -> None:
    step = step_of("wan2.1-t2v-1.3b", backend="ddp", processes=2, per_host=8)
    tokens = token_count(CLIP), token_count(IMAGE)
    one, two = (step.micro_batch(samples, tokens[0], ALL).total() for samples in (1, 2))
    image = step.micro_batch(2, tokens[1], ()).total()
    backward = [
        step.backward(samples, size).total() for samples, size in ((1, tokens[0]), (2, tokens[1]), (2, tokens[0]))
    ]
    mean = (6 * backward[0] + 4 * backward[1] + 2 * backward[2]) / 12
    expected = (6 * one + 4 * image + 2 * two) / (2 * 3) + step.optimizer_step(mean).total()
    found = epoch()
    assert found.step.total() == pytest.approx(expected) and found.seconds() == pytest.approx(3 * expected)
    flops = 10 * step.network.forward_backward(tokens[0]) + 8 * step.network.forward_backward(tokens[1])
    assert found.mfu() == pytest.approx(flops / (3 * expected * 2 * 989e12))
    assert found.seconds_of([IMAGE, CLIP]) == pytest.approx([4 * image, 6 * one + 2 * two])
    assert [(size.bucket, size.samples) for size in found.sizes] == [(CLIP, 1), (CLIP, 2), (IMAGE, 2)]
    assert found.idle() == 4  # the images


def test_gpus_that_wait_for_others_take_longer() -> None:
    even, uneven = epoch(), epoch(balance=0.8)
    work = sum(size.count * size.parts.total() for size in even.sizes) / (2 * 3)
    assert even.step.waiting == 0 and uneven.step.waiting == pytest.approx(work / 0.8 - work)
    assert uneven.mfu() < even.mfu()


def test_what_limits_a_step_is_named() -> None:
    parts = Parts(attention=6, matmul=3, memory=0.9, launches=0.1)
    assert limit_words(parts) == "limited by attention (60%; matrix products 30%, memory traffic 9%)"
    waiting = Parts(attention=3, waiting=1)
    assert limit_words(waiting, gpus=8) == "limited by attention (75%; waiting for other GPUs 25%)"
    assert limit_words(waiting, gpus=1) == "limited by attention (75%; padding of the last step 25%)"
    assert limit_words(Parts(assumed=2)) == "limited by the model's FLOPs (100%)"


def test_the_lines_have_the_computed_numbers() -> None:
    found = epoch()
    first, assumed, _, *sizes = step_time_lines(found, 0.5, "rates")
    assert first.startswith(f"step, computed, not measured: {found.step.total():.3g} s, and 0.5 s of encoding; ")
    assert f"MFU {found.mfu():.1%} (without encoding); limited by attention" in first and assumed == "  rates"
    for line, size in zip(sizes, found.sizes, strict=True):
        mfu = size.flops / size.parts.total() / 989e12
        assert f"{size.parts.total():.3g} s, MFU" in line and f"{mfu:.1%}" in line
    assert "2 x 1x256x256" in sizes[-1] and "kernel launches" in sizes[-1]
    assert step_time_lines(found, 0, "", most=1)[-1] == "    and 2 other sizes"


def test_flags_are_listed_by_the_time_that_they_save() -> None:
    useless = [FlagGain("--slower", 1.0, 2.0**30), FlagGain("--nothing", 0.0, 0.0, 2.0**30)]
    gains = [*useless, FlagGain("--b", 1.0, -(2.0**30)), FlagGain("--long", -2.5, -(2.0**31), 2.0**30, "needs it")]
    title, *lines = gain_lines(gains)
    assert "computed, not measured" in title and not gain_lines([]) and not gain_lines(useless)
    expected = ["--long -2.5 s -2.0 GiB, +1.0 GiB of host memory; needs it", "--b +1 s -1.0 GiB"]
    assert [" ".join(line.split()) for line in lines] == expected
