"""Tests of videox.models.streamed_blocks: bit-identical results, order of copies, and that nothing stale is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import SMALL_CONFIGS, blocks_of, build_transformer, model_inputs
from peft import LoraConfig
from torch import Tensor

from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.activation_offload import HostOffload
from videox.models.recompute import Recompute
from videox.models.streamed_blocks import COPY, RELEASE, USE, BlockStream, WeightCopies, stream_blocks

CPU = torch.device("cpu")


def adapted(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return a transformer with frozen bfloat16 weights and a LoRA in float32, in training mode."""
    torch.manual_seed(seed)
    model: Any = build_transformer({**SMALL_CONFIGS[name], **changes}).to(torch.bfloat16).train()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=r".*blocks\..*(to_q|to_v|to_out.0|proj_out|net.2)",
                                 init_lora_weights=False))  # fmt: skip
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return model


def results(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return output and gradients of a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(**given)[0]
    prediction.float().square().mean().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"output": prediction.detach(), **gradients}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def inputs_of(name: str) -> dict[str, Any]:
    config = SMALL_CONFIGS[name]
    torch.manual_seed(1)
    return model_inputs(config, 512 if config.get("image_dim") else 8, side=4, frames=2)[0]


@pytest.mark.parametrize(
    ("name", "keep", "offloaded"),
    [
        ("text", "", False),
        pytest.param("image", "attention", False, marks=pytest.mark.slow),
        pytest.param("joint", "", True, marks=pytest.mark.slow),
        ("joint, first frame replaced", "attention", True),
    ],
)
def test_outputs_and_gradients_are_bit_identical(name: str, keep: str, offloaded: bool) -> None:
    model, given = adapted(name), inputs_of(name)
    blocks = blocks_of(model)
    checkpoint_blocks(model, blocks, lambda *_: Recompute(1.0, keep), HostOffload(CPU) if offloaded else None)
    expected = results(model, given)
    frozen = [p for block in blocks for p in block.parameters() if not p.requires_grad]
    stream_blocks(blocks, range(len(blocks)), CPU, lambda value: [value])
    assert [p for block in blocks for p in block.parameters() if not p.requires_grad] == [] != frozen
    for _ in range(2):  # the second step begins with what the first one has left in the buffers
        assert_equal(results(model, given), expected)


def test_some_blocks_may_stay() -> None:
    model, given = adapted("text", num_layers=5), inputs_of("text")
    model.enable_gradient_checkpointing()
    expected = results(model, given)
    stream_blocks(model.blocks, [0, 2, 4], CPU, lambda value: [value])
    assert [any(not p.requires_grad for p in block.parameters()) for block in model.blocks] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert_equal(results(model, given), expected)


def test_passes_without_gradients_equal_those_of_blocks_that_stay() -> None:
    model, given = adapted("text", num_layers=4), inputs_of("text")
    model.enable_gradient_checkpointing()
    stream_blocks(model.blocks, range(4), CPU, lambda value: [value])
    resident = adapted("text", num_layers=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = resident(**given)[0]
        assert torch.equal(model(**given)[0], expected)
        assert torch.equal(model(**given)[0], expected)
    resident.enable_gradient_checkpointing()
    assert_equal(results(model, given), results(resident, given))  # as training after a validation


def test_a_block_is_copied_one_ahead_of_its_use_in_both_directions() -> None:
    """Each block has its buffer from the copy to the release; of four, the last two stay between the passes."""
    model, given = adapted("text", num_layers=4), inputs_of("text")
    model.enable_gradient_checkpointing()
    stream = stream_blocks(model.blocks, range(4), CPU, lambda value: [value])
    found: list[tuple[str, int, int]] = []
    stream.record = found.append
    results(model, given)
    forward = [
        (COPY, 0, 1), (USE, 0, 1), (COPY, 1, 0),
        (USE, 1, 0), (RELEASE, 0, 1), (COPY, 2, 1),
        (USE, 2, 1), (RELEASE, 1, 0), (COPY, 3, 0),
        (USE, 3, 0),
    ]  # fmt: skip
    backward = [
        (USE, 3, 0), (USE, 2, 1), (RELEASE, 3, 0), (COPY, 1, 0),
        (USE, 1, 0), (RELEASE, 2, 1), (COPY, 0, 1),
        (USE, 0, 1),
    ]  # fmt: skip
    assert found == forward + backward
    found.clear()
    results(model, given)  # the first two blocks are there from the backward pass
    assert found[:3] == [(USE, 0, 1), (USE, 1, 0), (RELEASE, 0, 1)]
    assert sum(what == COPY for what, *_ in found) == 4  # of eight runs


def test_at_most_two_blocks_have_buffers() -> None:
    model, given = adapted("joint"), inputs_of("joint")  # blocks of two shapes
    model.enable_gradient_checkpointing()
    blocks = blocks_of(model)
    stream = stream_blocks(blocks, range(len(blocks)), CPU, lambda value: [value])
    alive: dict[int, int] = {}

    def check(action: tuple[str, int, int]) -> None:
        what, number, buffer = action
        if what == COPY:
            assert buffer not in alive
            alive[buffer] = number
        elif what == RELEASE:
            assert alive.pop(buffer) == number
        else:
            assert alive[buffer] == number
        assert len(alive) <= 2

    stream.record = check
    results(model, given)
    assert len(alive) == 2


@pytest.mark.parametrize("mutant", ["no wait", "stale weights", "no recomputation"])
def test_what_is_not_waited_for_or_used_too_late_is_not_finite(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to read a buffer at the wrong time changes the result; for these the test above fails."""
    model, given = adapted("text", num_layers=4), inputs_of("text")
    if mutant != "no recomputation":  # then autograd saves the weights of the forward pass
        model.enable_gradient_checkpointing()
    stream_blocks(model.blocks, range(4), CPU, lambda value: [value])
    if mutant == "no wait":
        monkeypatch.setattr(WeightCopies, "wait", lambda self: None)
    if mutant == "stale weights":  # the block that follows is copied over the one that runs
        copy = BlockStream._copy
        monkeypatch.setattr(BlockStream, "_copy", lambda self, number, buffer: copy(self, number, 0))
    try:
        found = results(model, given)
    except (RuntimeError, ValueError):
        return  # autograd has noticed it, or the schedule has
    assert not all(bool(value.isfinite().all()) for value in found.values())
