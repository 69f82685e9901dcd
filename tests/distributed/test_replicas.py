"""Tests of videox.distributed.replicas: sums that every changed bit changes, and what is said of ranks that differ."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videox.distributed import replicas
from videox.distributed.replicas import LEAST_STEPS, NEVER, ReplicaCheck, bit_sum
from videox.errors import NUMERICS, UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8)
CPU = torch.device("cpu")


def expected_sum(tensor: Tensor, word: int) -> int:
    """Return the sum of a tensor's bytes, read as signed (or unsigned single) numbers of `word` bytes."""
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    parts = [content[at : at + word] for at in range(0, len(content), word)]
    total = sum(int.from_bytes(part, "little", signed=word > 1) for part in parts)
    return (total + 2**63) % 2**64 - 2**63


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 99), dtype=st.sampled_from(DTYPES), offset=st.integers(0, 3), part=st.sampled_from([5, 1 << 24]), bit=st.integers(0, 10**6))  # fmt: skip
def test_one_changed_bit_anywhere_changes_the_sum(
    size: int, dtype: torch.dtype, offset: int, part: int, bit: int
) -> None:
    memory = torch.randint(0, 256, ((size + offset) * dtype.itemsize,), dtype=torch.uint8)
    tensor = memory.view(dtype)[offset:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "PART", part)
        before = bit_sum(tensor)
        aligned = tensor.nbytes % 8 == 0 and offset * dtype.itemsize % 8 == 0
        assert before.dtype == torch.int64
        assert int(before) == expected_sum(tensor, 8 if aligned else dtype.itemsize)
        memory[offset * dtype.itemsize + bit // 8 % tensor.nbytes] ^= 1 << bit % 8
        assert int(bit_sum(tensor)) != int(before)


def test_shape_and_order_of_the_additions_do_not_matter() -> None:
    values = torch.randn(6, 4, 10)
    assert bit_sum(values) == bit_sum(values.flatten()) == bit_sum(values.clone())
    assert bit_sum(torch.zeros(0)) == 0 and bit_sum(torch.tensor(1.5)).shape == ()


# ------------------------------------------------------------------------------------------------------ comparison


class Ranks:
    """Ranks as threads of one process: each compares its own weights, and all get the reports of all.

    Args:
        weights: of each rank.
        seconds: by which each reading moves the clock.
        settings: of ReplicaCheck.
    """

    def __init__(self, weights: Sequence[Tensor], seconds: float = 0.0, **settings: Any) -> None:
        self.weights, self.reports, self.barrier = weights, [None] * len(weights), threading.Barrier(len(weights))
        self.clocks = [0.0] * len(weights)
        self.checks = [
            ReplicaCheck(CPU, partial(self._gather, rank), now=partial(self._now, rank, seconds), **settings)
            for rank in range(len(weights))
        ]

    def _now(self, rank: int, seconds: float) -> float:
        self.clocks[rank] += seconds
        return self.clocks[rank]

    def _gather(self, rank: int, report: Any) -> list[Any]:
        self.reports[rank] = report
        self.barrier.wait(10)
        return list(self.reports)

    def compare(self, step: int) -> str:
        """Compare a second after the comparison before; return the line, or raise the error, that all ranks have."""
        self.clocks = [clock + 1 for clock in self.clocks]
        with ThreadPoolExecutor(len(self.checks)) as pool:
            work = [
                pool.submit(check.compare, [("a", torch.ones(3)), ("b", weights)], step)
                for check, weights in zip(self.checks, self.weights, strict=True)
            ]
        errors = {str(each.exception()) for each in work}
        assert len(errors) == 1 and len({check.every for check in self.checks}) == 1
        return work[0].result()


def test_equal_weights_pass_and_different_ones_end_the_run_with_names() -> None:
    weights = [torch.arange(12.0) for _ in range(4)]
    ranks = Ranks(weights)
    assert ranks.compare(1) == ""
    weights[2].view(torch.int32)[7] ^= 1
    with pytest.raises(UserError) as error:
        ranks.compare(101)
    assert error.value.exit_code == NUMERICS
    assert "step 101: the weights of rank 2 are not those of ranks 0, 1, 3," in str(error.value)
    assert "1 of 2 tensors differ, the first one is b; they became different after step 1." in str(error.value)


def test_two_ranks_without_a_majority_are_both_named() -> None:
    with pytest.raises(UserError, match=r"the weights of rank 1 are not those of rank 0,.* in the first step of this"):
        Ranks([torch.zeros(8), torch.ones(8)]).compare(1)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_set_of_odd_ranks_is_named(size: int) -> None:
    for odd in itertools.chain.from_iterable(
        itertools.combinations(range(size), n) for n in range(1, (size + 1) // 2)
    ):
        weights = [torch.ones(4) * (1 + (rank in odd)) for rank in range(size)]
        with pytest.raises(UserError) as error:
            Ranks(weights).compare(1)
        assert f"the weights of rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} are not" in str(error.value)


def due_steps(check: ReplicaCheck, compare: Callable[[int], str], steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if check.is_due(step) and compare(step) is not None]


def test_it_is_due_after_the_first_step_and_then_every_n_steps() -> None:
    ranks = Ranks([torch.ones(4)] * 2, every=7)
    assert due_steps(ranks.checks[0], ranks.compare, 30) == [1, 8, 15, 22, 29]
    automatic = Ranks([torch.ones(4)] * 2)
    assert due_steps(automatic.checks[0], automatic.compare, 250) == [1, 1 + LEAST_STEPS, 1 + 2 * LEAST_STEPS]
    never = Ranks([torch.zeros(4), torch.ones(4)], every=NEVER)
    assert due_steps(never.checks[0], never.compare, 9) == [] and never.compare(10) == ""


def test_sharded_weights_are_never_compared() -> None:
    check = ReplicaCheck(CPU, lambda report: pytest.fail("gathered"))
    assert check.is_due(1) and check.compare([], 1) == "" and not check.is_due(1000)


@pytest.mark.parametrize("seconds", [1e-4, 0.5])
def test_the_automatic_interval_costs_a_thousandth_of_the_time_at_most(seconds: float) -> None:
    """100 steps take a second, and a comparison `seconds`."""
    ranks = Ranks([torch.ones(4)] * 2, seconds)
    assert ranks.compare(1) == ""
    line = ranks.compare(101)
    every = ranks.checks[0].every
    assert every >= LEAST_STEPS and (every > LEAST_STEPS) == (seconds > 0.01)
    measured = [float(word) for word in line.split() if word.replace(".", "").isdigit()]
    assert line.startswith(
        f"replicas: 2 weights of 2 ranks are compared in {1000 * seconds:.1f} ms, every {every} steps"
    )
    assert measured[-1] <= 0.1
    assert ranks.compare(101 + every) == ""  # printed once


def test_a_second_comparison_of_a_step_does_nothing() -> None:
    weights = [torch.ones(4), torch.ones(4)]
    ranks = Ranks(weights, every=1)
    assert ranks.compare(1) == ""
    weights[1][0] = 2
    assert ranks.compare(1) == ""
    with pytest.raises(UserError):
        ranks.compare(2)
