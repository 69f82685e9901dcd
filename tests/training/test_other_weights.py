"""Tests of videox.training.other_weights: whether the weights fit on the GPU beside the training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from videox.training.other_weights import SAMPLING_ROOM, fits_beside

GIB = 2**30


def test_weights_fit_beside_the_training_or_one_line_says_that_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 50 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 34 * GIB)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda:0"), print=printed.append)
    fits = fits_beside(accelerator)
    assert fits(36 * GIB - SAMPLING_ROOM) and printed == []  # what torch has reserved and does not use counts as free
    assert not fits(36 * GIB - SAMPLING_ROOM + 1) and not fits(100 * GIB)
    (line,) = printed
    assert "the other expert (30.1 GB) does not fit on the GPU beside the training (38.7 GB are free)" in line


def test_on_a_cpu_the_weights_are_there() -> None:
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    assert fits_beside(accelerator)(10**15)
