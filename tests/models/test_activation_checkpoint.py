"""Serves videox/recompute.py: the chosen blocks of a real Wan, and no others, run twice, with equal gradients."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

from videox.diffusion.flow_matching import keyed_noise
from videox.models.activation_checkpoint import recompute_blocks, select_blocks

LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("wan"), layers=LAYERS)


def load(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").train()


def step(model: WanTransformer3DModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int]]:
    """Returns (output, gradients, how often each block ran forward) of a forward and backward pass."""
    runs: Counter[int] = Counter()
    hooks = [
        block.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
        for number, block in enumerate(model.blocks)
    ]
    latents, text = keyed_noise(1, (2, 16, 2, 4, 6)), keyed_noise(2, (2, 8, 32))
    output = model(latents, torch.tensor([500.0, 20.0]), text, return_dict=False)[0]
    (output - keyed_noise(3, output.shape)).square().mean().backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), gradients, [runs[number] for number in range(len(model.blocks))]


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0])
def test_a_share_of_the_blocks_runs_twice(folder: Path, share: float) -> None:
    model = load(folder)
    recompute_blocks(model, model.blocks, share)
    runs = step(model)[2]
    twice = [number for number, count in enumerate(runs) if count == 2]
    assert twice == select_blocks(LAYERS, share)
    assert len(twice) == math.floor(share * LAYERS + 0.5)
    assert sorted(set(runs) - {2}) in ([], [1])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gradients_are_equal_to_the_bit(folder: Path, share: float) -> None:
    plain, chosen = load(folder), load(folder)
    recompute_blocks(chosen, chosen.blocks, share)
    wanted, found = step(plain), step(chosen)
    assert torch.equal(wanted[0], found[0])
    assert wanted[1].keys() == found[1].keys()
    assert all(torch.equal(wanted[1][name], found[1][name]) for name in wanted[1])


def test_all_of_them_is_what_diffusers_recomputes(folder: Path) -> None:
    theirs, ours = load(folder), load(folder)
    theirs.enable_gradient_checkpointing()
    recompute_blocks(ours, ours.blocks, 1.0)
    assert step(theirs)[2] == step(ours)[2] == [2] * LAYERS


def test_fewer_activations_are_kept(folder: Path) -> None:
    def kept(share: float) -> int:
        model, sizes = load(folder), []
        recompute_blocks(model, model.blocks, share)
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            latents, text = keyed_noise(1, (1, 16, 2, 4, 6)), keyed_noise(2, (1, 8, 32))
            model(latents, torch.tensor([500.0]), text, return_dict=False)
        return sum(sizes)

    none, half, every = kept(0.0), kept(0.5), kept(1.0)
    assert every < 0.3 * none
    assert half == pytest.approx((none + every) / 2, rel=0.05)


@given(st.integers(1, 60), st.floats(0, 1))
def test_chosen_blocks_are_evenly_spaced(count: int, share: float) -> None:
    chosen = select_blocks(count, share)
    assert all(0 <= block < count for block in chosen)
    assert sorted(set(chosen)) == chosen
    assert abs(len(chosen) - count * share) <= 0.5 + 1e-9
    for block in range(count):  # at no point are more than half a block too many or too few chosen
        so_far = sum(1 for number in chosen if number <= block)
        assert abs(so_far - (block + 1) * share) <= 0.5 + 1e-9


def wrapped_by_the_original(count: int, share: float) -> list[int]:
    """Block i is wrapped when (i + 1) * share reaches the next half."""
    cut, found = 0.5, []
    for block in range(count):
        if (block + 1) * share >= cut:
            cut += 1
            found.append(block)
    return found


@given(st.integers(1, 60), st.integers(0, 16).map(lambda sixteenths: sixteenths / 16))
def test_chosen_blocks_are_the_originals(count: int, share: float) -> None:
    assert select_blocks(count, share) == wrapped_by_the_original(count, share)
