"""Tests of videox.models.activation_checkpoint: only the selected blocks of a real Wan run twice, with equal
gradients.
"""

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
    """Run a forward and a backward pass; return (output, gradients, how often each block ran forward)."""
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
def test_selected_blocks_run_forward_twice(folder: Path, share: float) -> None:
    model = load(folder)
    recompute_blocks(model, model.blocks, share)
    runs = step(model)[2]
    twice = [number for number, count in enumerate(runs) if count == 2]
    assert twice == select_blocks(LAYERS, share)
    assert len(twice) == math.floor(share * LAYERS + 0.5)
    assert sorted(set(runs) - {2}) in ([], [1])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gradients_are_bit_identical(folder: Path, share: float) -> None:
    plain, selected = load(folder), load(folder)
    recompute_blocks(selected, selected.blocks, share)
    expected, actual = step(plain), step(selected)
    assert torch.equal(expected[0], actual[0])
    assert expected[1].keys() == actual[1].keys()
    assert all(torch.equal(expected[1][name], actual[1][name]) for name in expected[1])


def test_share_of_one_equals_diffusers_gradient_checkpointing(folder: Path) -> None:
    reference, model = load(folder), load(folder)
    reference.enable_gradient_checkpointing()
    recompute_blocks(model, model.blocks, 1.0)
    assert step(reference)[2] == step(model)[2] == [2] * LAYERS


def test_fewer_activations_are_stored(folder: Path) -> None:
    def stored_elements(share: float) -> int:
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

    none, half, every = stored_elements(0.0), stored_elements(0.5), stored_elements(1.0)
    assert every < 0.3 * none
    assert half == pytest.approx((none + every) / 2, rel=0.05)


@given(st.integers(1, 60), st.floats(0, 1))
def test_selected_blocks_are_evenly_spaced(count: int, share: float) -> None:
    selected = select_blocks(count, share)
    assert all(0 <= block < count for block in selected)
    assert sorted(set(selected)) == selected
    assert abs(len(selected) - count * share) <= 0.5 + 1e-9
    for block in range(count):  # at every block the count differs from the exact share by at most half a block
        so_far = sum(1 for number in selected if number <= block)
        assert abs(so_far - (block + 1) * share) <= 0.5 + 1e-9


def select_blocks_originally(count: int, share: float) -> list[int]:
    """Block i is selected when (i + 1) * share reaches the next half, as in the original trainer."""
    threshold, actual = 0.5, []
    for block in range(count):
        if (block + 1) * share >= threshold:
            threshold += 1
            actual.append(block)
    return actual


@given(st.integers(1, 60), st.integers(0, 16).map(lambda sixteenths: sixteenths / 16))
def test_selected_blocks_are_those_of_the_original_trainer(count: int, share: float) -> None:
    assert select_blocks(count, share) == select_blocks_originally(count, share)
