"""Tests of videox.engine.streamed: training with streamed blocks equals that with resident blocks, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from networks import SMALL_CONFIGS, blocks_of, build_transformer, model_inputs
from torch import Tensor

from videox.engine.ddp import DdpEngine
from videox.engine.streamed import StreamedEngine
from videox.engine.train_state import TrainState
from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.recompute import Recompute
from videox.models.streamed_blocks import COPY, RELEASE, WeightCopies
from videox.models.trained_stream import stream_trained
from videox.optim.build import choose_trainable, clip_limit, make_optimizer, parameter_groups

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "epsilon": 1e-8}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="bf16")


def network(name: str, dtype: torch.dtype) -> Any:
    """Return a small transformer in training mode, always with the same weights; blocks are recomputed."""
    torch.manual_seed(0)
    model: Any = build_transformer(SMALL_CONFIGS[name]).to(dtype)
    checkpoint_blocks(model, blocks_of(model), lambda *_: Recompute(1.0, ""))
    return model


def engine_of(
    accelerator: Accelerator,
    name: str = "text",
    optimizer: str = "adamw_offload",
    *,
    streamed: bool,
    trainable: str = ".",
    half: tuple[str, ...] = (),
) -> DdpEngine:
    model = network(name, torch.bfloat16 if "bf16" in optimizer else torch.float32)
    names = choose_trainable(model, [trainable], half)
    stream = stream_trained(blocks_of(model), range(len(blocks_of(model))), CPU) if streamed else None

    def make(parameters: Any) -> torch.optim.Optimizer:
        return make_optimizer(parameter_groups(parameters, *names), name=optimizer, **SETTINGS)

    if stream is None:
        return DdpEngine(accelerator, model, make)
    return StreamedEngine(accelerator, model, make, stream)


def inputs_of(name: str, seed: int) -> dict[str, Any]:
    config = SMALL_CONFIGS[name]
    torch.manual_seed(seed)
    return model_inputs(config, 512 if config.get("image_dim") else 8, side=4, frames=2)[0]


def micro_batch(accelerator: Accelerator, engine: DdpEngine, name: str, seed: int) -> Tensor:
    """Accumulate the gradients of a micro-batch and return its loss."""
    loss = engine.model(**inputs_of(name, seed))[0].float().square().mean()
    accelerator.backward(loss)
    return loss.detach()


def gradients(engine: DdpEngine) -> dict[str, Tensor]:
    if isinstance(engine, StreamedEngine):
        engine._stream.gradients.wait()
    return {name: p.grad.clone() for name, p in engine.network.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def train(
    accelerator: Accelerator, engine: DdpEngine, name: str, steps: range, micro_batches: int = 2
) -> list[tuple[float, float, bool]]:
    """Train and return loss, gradient norm and whether the step was applied; the third step has an infinite loss."""
    found = []
    for step in steps:
        engine.set_lr(1e-3 * (1 + step % 3))
        losses = [micro_batch(accelerator, engine, name, 10 * step + n) for n in range(micro_batches)]
        loss = torch.stack(losses).sum() * (torch.inf if step == 2 else 1)
        torch.manual_seed(step)  # of stochastic rounding
        limit = partial(clip_limit, step=step, max_grad_norm=0.05, initial_ratio=1.0, ramp_steps=1)
        update = engine.update(loss=loss, empty=False, limit=limit)
        found.append((float(loss), float(update.grad_norm), bool(update.applied)))
    return found


@pytest.mark.parametrize("name", ["text", "joint", pytest.param("image", marks=pytest.mark.slow)])
def test_gradients_and_norms_equal_those_of_resident_blocks(accelerator: Accelerator, name: str) -> None:
    """Of one micro-batch, and of two that are added, in bfloat16."""
    resident, streamed = (
        engine_of(accelerator, name, "adamw_bf16_offload", streamed=streamed) for streamed in (False, True)
    )
    assert isinstance(streamed, StreamedEngine)
    blocks = {p for block in blocks_of(streamed.network) for p in block.parameters()}
    for seed in range(2):
        losses = [micro_batch(accelerator, engine, name, seed) for engine in (resident, streamed)]
        assert torch.equal(*losses)
        assert_equal(gradients(streamed), gradients(resident))
        norm = torch.nn.utils.get_total_norm([p.grad for p in resident.trainable if p.grad is not None])
        assert torch.equal(streamed._gradient_norm(), norm)
    assert blocks == {*streamed._stream.parameters} and len(blocks) < len(streamed.trainable)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("joint", "adamw_offload"),
        ("text", "adamw_bf16_offload"),
        pytest.param("image", "adamw_offload", marks=pytest.mark.slow),
        pytest.param("joint, first frame replaced", "adamw_bf16_offload", marks=pytest.mark.slow),
    ],
)
def test_ten_clipped_steps_equal_those_of_resident_blocks(
    accelerator: Accelerator, name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._dynamo.config.disable", True)  # torchao's step is compiled for each shape otherwise
    resident, streamed = (engine_of(accelerator, name, optimizer, streamed=streamed) for streamed in (False, True))
    found, expected = (train(accelerator, engine, name, range(10)) for engine in (streamed, resident))
    assert found == expected
    assert [applied for *_, applied in found] == [step != 2 for step in range(10)]
    assert all(norm > 0.05 for _, norm, _ in found)  # every step is clipped
    assert_equal(dict(streamed.network.state_dict()), dict(resident.network.state_dict()))
    assert_equal(dict(streamed_moments(streamed)), dict(streamed_moments(resident)))


def streamed_moments(engine: DdpEngine) -> dict[str, Tensor]:
    return {f"{kind} of {name}": values for kind, name, values in engine.saved_tensors() if kind != "weight"}
