"""Tests of the memory model of quantised and streamed runs: the bytes of tensors that a training step has on the CPU.

Every storage is counted: parameters, buffers, gradients, moments, the buffers of streamed blocks, and all that forward
and backward pass allocate at a time, copies included. At the widths of the published models the tensors are fake ones:
they have shapes and storages, and no values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import runs
import torch
from accelerate import Accelerator
from networks import CONFIGS, SMALL_WAN, blocks_of, build_transformer, is_joint, model_inputs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from videox.estimate.flops import cross_attention_network, joint_attention_network
from videox.estimate.memory import BlockWeights, Encoders, MemorySetup, Parameters, memory_of
from videox.estimate.peak_memory import peak_bytes
from videox.lora.adapters import Lora
from videox.lora.targets import adapter_sizes, choose_targets
from videox.models import streamed_blocks
from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.base_precision import BF16, is_quantised
from videox.models.quantised import QuantisedLinear, empty_quantised
from videox.models.recompute import Recompute
from videox.models.streamed_blocks import BlockStream, stream_blocks
from videox.models.transformer import attach_adapters

CPU, RANK, TEXT = torch.device("cpu"), 32, 256
WAN, HUNYUAN = "Wan2.1-T2V-14B", "HunyuanVideo"
SMALL = {**SMALL_WAN, "num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "rope_max_seq_len": 64}
TARGETS: Mapping[bool, Mapping[str, tuple[str, ...]]] = {
    False: {"blocks": ("attn1", "attn2", "ffn")},
    True: {
        "transformer_blocks": ("attn", "ff", "ff_context"),
        "single_transformer_blocks": ("attn", "proj_mlp", "proj_out"),
    },
}


def block_weights(block: nn.Module) -> BlockWeights:
    linear = [p.shape for name, p in block.named_parameters() if is_quantised(name, p.shape)]
    counts = [math.prod(shape) for shape in linear]
    return BlockWeights(
        sum(p.numel() for p in block.parameters()), sum(counts), sum(s[0] for s in linear), max(counts)
    )


def with_tensors(model: nn.Module) -> None:
    """Replace the parameters and buffers of a model on the meta device by small random ones on the CPU."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.rand(parameter.shape).div_(100).to(parameter.dtype)
            module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.rand(buffer.shape).to(buffer.dtype)


def without_memory(size: int, **_: object) -> tuple[Tensor, bool]:
    """As allocate_shared, for fake tensors, which have no shared memory."""
    return torch.empty(size, dtype=torch.uint8), True


class Step:
    """A transformer with a LoRA as a run has it, on the meta device until it is placed.

    Attributes:
        parameters: for the estimate.
        stream: of the streamed blocks, or None.
    """

    def __init__(self, config: Mapping[str, Any], precision: str) -> None:
        torch.manual_seed(0)
        with torch.device("meta"):
            self.model: Any = build_transformer(config).train()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        self.blocks = blocks_of(self.model)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        of_blocks = tuple(block_weights(block) for block in self.blocks)
        frozen = sum(p.numel() for p in self.model.parameters())
        if precision != BF16:
            for block in self.blocks:
                for name in [n for n, p in block.named_parameters() if is_quantised(n, p.shape)]:
                    path = name.removesuffix(".weight")
                    layer: Any = block.get_submodule(path)
                    values, scale = empty_quantised(layer.out_features, layer.in_features, precision)
                    block.set_submodule(path, QuantisedLinear(layer, precision, (values.to("meta"), scale.to("meta"))))
        targets = choose_targets(shapes, TARGETS[is_joint(config)], None)
        values = {}
        for target in targets:
            outputs, inputs = shapes[f"{target}.weight"]
            values[f"{target}.lora_A.default.weight"] = torch.full((RANK, inputs), 0.01)
            values[f"{target}.lora_B.default.weight"] = torch.full((outputs, RANK), 0.01)
        with runs.restored_process_state():
            attach_adapters(self.model, Lora(RANK, float(RANK), 0.0, targets), values, Accelerator(cpu=True))
        trained = sum(adapter_sizes(shapes, targets, RANK).values())
        assert trained == sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        outside = frozen - sum(block.elements for block in of_blocks)
        self.parameters = Parameters(frozen + trained, trained, max(b.elements for b in of_blocks), outside, of_blocks)
        self.stream: BlockStream | None = None

    def place(self, *, streamed: bool) -> None:
        """Give the model tensors on the CPU, its blocks recomputation and streams, and the run an optimizer."""
        with_tensors(self.model)
        checkpoint_blocks(self.model, self.blocks, lambda *_: Recompute(1.0))
        if streamed:
            self.stream = stream_blocks(self.blocks, range(len(self.blocks)), CPU, lambda value: [value])
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0)

    def run(self, given: Mapping[str, Any]) -> None:
        """Run forward and backward pass; the gradients are added to those that are there."""
        with torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16):
                prediction = self.model(**given)[0]
            prediction.float().square().mean().backward()

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are there between two steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from (p.grad for p in self.model.parameters() if p.grad is not None)
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if value.ndim)
        if self.stream is not None:
            yield from self.stream._buffers


def measured(step: Step, given: Mapping[str, Any]) -> tuple[int, int]:
    """Return the bytes of all storages between two steps, and the most that a step adds."""
    step.run(given)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=False)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in step.tensors()}
    there = storages.keys() | {t.untyped_storage()._cdata for t in given.values() if isinstance(t, Tensor)}
    peak = peak_bytes(lambda: step.run(given), ignore=lambda t: t.untyped_storage()._cdata in there)  # views of them
    return sum(storages.values()), peak


def assert_agrees(
    config: Mapping[str, Any], step: Step, given: Mapping[str, Any], tokens: int, **changes: Any
) -> None:
    """Assert that the bytes of a step are those of its estimate, within 5 %."""
    states, peak = measured(step, given)
    if is_joint(config):
        network = joint_attention_network(config, text_tokens=TEXT, half=True, cast=False)
    else:
        network = cross_attention_network(config, text_tokens=TEXT, image_tokens=0, half=True)
    setup = MemorySetup(
        "single", 1, 1, half=True, recompute_share=1.0, offload_encoders=False, workers=0, tokens=tokens, batch=1, zero={},
        lora_rank=RANK, cached=True, streamed=len(step.blocks) if step.stream else 0, **changes,
    )  # fmt: skip
    found = memory_of(step.parameters, replace(network, frozen=True), Encoders({}, 0.0), setup)
    training = found.phases["training"]
    print(f"states {states} {sum(found.states.values()):.0f}, peak {peak} {sum(training.values()):.0f} {training}")
    assert sum(found.states.values()) == pytest.approx(states, rel=0.01)
    assert sum(training.values()) == pytest.approx(peak, rel=0.1)
    assert found.only("training").allocated() == pytest.approx(states + peak, rel=0.05)
    if step.stream is not None:
        assert found.host["streamed blocks"] == pytest.approx(step.stream.bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "streamed"), product((WAN, HUNYUAN), (BF16, "fp8", "int8", "nf4"), (False, True))
)
def test_counted_bytes_agree_with_the_memory_model(
    name: str, precision: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four blocks at published widths and 49x512x512."""
    monkeypatch.setattr(streamed_blocks, "allocate_shared", without_memory)
    config = {**CONFIGS[name], "num_layers": 2 if is_joint(CONFIGS[name]) else 4}
    config |= {"num_single_layers": 2} if is_joint(config) else {}
    step = Step(config, precision)
    with FakeTensorMode():
        given, _ = model_inputs(config, TEXT)
        given["hidden_states"] = torch.randn(1, config["in_channels"], 13, 64, 64)
        step.place(streamed=streamed)
        assert_agrees(config, step, given, 13 * 32 * 32, base_precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "streamed"), [(BF16, False), ("nf4", True)])
def test_tensors_with_values_have_the_bytes_of_fake_ones(
    precision: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted at published widths is counted on tensors without memory; both ways agree at a small width."""
    config, counted = {**SMALL, "num_layers": 3}, []
    for mode in (nullcontext(), FakeTensorMode()):
        step = Step(config, precision)
        with mode, monkeypatch.context() as patch:
            if isinstance(mode, FakeTensorMode):
                patch.setattr(streamed_blocks, "allocate_shared", without_memory)
            given, _ = model_inputs(config, TEXT, side=16, frames=2)
            step.place(streamed=streamed)
            counted.append(measured(step, given))
    (states, peak), (fake_states, fake_peak) = counted
    assert states == pytest.approx(fake_states, rel=0.001)
    assert peak == pytest.approx(fake_peak, rel=0.01)
