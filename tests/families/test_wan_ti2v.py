"""Tests of videox.families.wan_ti2v: which samples are given their first frame, and what the transformer gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.diffusion.flow_matching import motion_losses, velocity_losses
from videox.families.wan_ti2v import given_frame, given_frames, transformer_inputs
from videox.rng import hash_key
from videox.training.validation_loss import HeldOut

KEYS = [int(key) for key in hash_key(5, np.arange(4000))]


def drawn(keys: list[int], ratio: float, frames: int = 3) -> torch.Tensor:
    """Return 1 for each sample that is given its first frame."""
    batch: Any = {"keys": keys}
    found = given_frame(torch.zeros(len(keys), 2, 1, 4, 6), frames, batch, ratio, patch=2)
    generated = found["generated"]
    assert torch.equal(generated[:, 0, 1:, 0, 0], torch.ones(len(keys), frames - 1))  # later frames are never given
    assert found["token_generated"].shape == (len(keys), frames * 2 * 3)
    assert torch.equal(found["token_generated"].view(len(keys), frames, 6), generated[:, 0, :, 0].expand(-1, -1, 6))
    return 1 - generated[:, 0, 0, 0, 0]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_given_first_frames_is_the_flag(ratio: float) -> None:
    assert drawn(KEYS, ratio).mean().item() == pytest.approx(ratio, abs=0.02 if 0 < ratio < 1 else 0)


@settings(max_examples=20)
@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=8), st.floats(0, 1))
def test_a_draw_is_of_the_sample_and_not_of_its_batch(keys: list[int], ratio: float) -> None:
    assert drawn(keys, ratio).tolist() == [drawn([key], ratio).item() for key in keys]


def test_more_of_them_with_a_larger_share_are_the_same_and_others() -> None:
    assert bool((drawn(KEYS, 0.7) >= drawn(KEYS, 0.3)).all())


def test_an_image_is_never_given() -> None:
    assert not drawn(KEYS, 1.0, frames=1).any()


def test_a_micro_batch_of_both_kinds_has_the_inputs_of_each() -> None:
    batch: Any = {"keys": KEYS[:6]}
    generator = torch.Generator().manual_seed(0)
    noisy, first = torch.randn(6, 2, 3, 4, 6, generator=generator), torch.randn(6, 2, 1, 4, 6, generator=generator)
    sigmas = torch.linspace(0.1, 0.9, 6)
    found = {"prompt_embeds": torch.zeros(6, 1, 1), **given_frame(first, 3, batch, 0.5, patch=2)}
    inputs, chosen = transformer_inputs(noisy, sigmas, found), drawn(KEYS[:6], 0.5) == 1
    assert 0 < chosen.sum() < 6
    states, timesteps = inputs["hidden_states"], inputs["timestep"].view(6, 3, 6)
    assert torch.equal(states[:, :, 1:], noisy[:, :, 1:])
    assert torch.equal(states[chosen][:, :, :1], first[chosen])
    assert torch.equal(states[~chosen], noisy[~chosen])
    assert torch.equal(timesteps[~chosen], (1000 * sigmas)[~chosen].view(-1, 1, 1).expand(-1, 3, 6))
    assert not timesteps[chosen][:, 0].any() and timesteps[chosen][:, 1:].gt(0).all()
    rows = [HeldOut(noisy[:1], {name: value[i : i + 1] for name, value in found.items()}) for i in range(6)]
    assert [given_frames(row) for row in rows] == chosen.int().tolist()


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_losses_leave_out_what_is_given(frames: int) -> None:
    generator = torch.Generator().manual_seed(frames)
    prediction, target = (torch.randn(4, 3, frames, 4, 6, generator=generator) for _ in range(2))
    generated = torch.ones(4, 1, frames, 1, 1)
    generated[:2, :, 0] = 0
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0])
    losses = velocity_losses(prediction, target, weights, generated)
    moving = motion_losses(prediction, target, losses, 0.3, generated)
    for sample in range(4):
        part = slice(sample, sample + 1), slice(None), slice(1 if sample < 2 else 0, None)
        alone = velocity_losses(prediction[part], target[part], weights[sample : sample + 1])
        assert torch.allclose(losses[sample : sample + 1], alone, rtol=1e-6)
        alone = motion_losses(prediction[part], target[part], alone, 0.3)
        assert torch.allclose(moving[sample : sample + 1], alone, rtol=1e-6)


def test_what_is_predicted_for_a_given_frame_has_no_gradient() -> None:
    prediction = torch.randn(2, 3, 4, 2, 2, requires_grad=True)
    generated = torch.ones(2, 1, 4, 1, 1)
    generated[0, :, 0] = 0
    losses = velocity_losses(prediction, torch.zeros(2, 3, 4, 2, 2), torch.ones(2), generated)
    motion_losses(prediction, torch.zeros(2, 3, 4, 2, 2), losses, 0.5, generated).sum().backward()
    assert prediction.grad is not None
    assert not prediction.grad[0, :, 0].any() and prediction.grad[1, :, 0].all() and prediction.grad[:, :, 1:].all()


def test_a_loss_without_given_frames_is_the_plain_one() -> None:
    prediction, target = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    plain = velocity_losses(prediction, target, torch.ones(2))
    assert torch.allclose(velocity_losses(prediction, target, torch.ones(2), torch.ones(2, 1, 4, 1, 1)), plain)
