"""Tests of videox.engine.streamed: training with streamed blocks is bit-identical to that with resident blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from accelerate import Accelerator
from networks import SMALL_CONFIGS, blocks_of, build_transformer, model_inputs
from torch import Tensor

from videox.engine.ddp import DdpEngine
from videox.engine.ema import EmaEngine
from videox.engine.streamed import StreamedEngine
from videox.engine.train_state import TrainState
from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.activation_offload import HostOffload
from videox.models.recompute import Recompute
from videox.models.streamed_blocks import COPY, RELEASE, WeightCopies
from videox.models.trained_stream import stream_trained
from videox.optim.build import choose_trainable, clip_limit, make_optimizer, parameter_groups

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "epsilon": 1e-8}


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    with runs.restored_process_state():
        yield Accelerator(cpu=True, mixed_precision="bf16")


def network(name: str, dtype: torch.dtype, keep: str = "", **changes: Any) -> Any:
    """Return a small transformer, always with the same weights; blocks are recomputed, and keep what `keep` says."""
    torch.manual_seed(0)
    model: Any = build_transformer({**SMALL_CONFIGS[name], **changes}).to(dtype)
    checkpoint_blocks(model, blocks_of(model), lambda *_: Recompute(1.0, keep), HostOffload(CPU) if keep else None)
    return model


def engine_of(
    accelerator: Accelerator,
    name: str = "text",
    optimizer: str = "adamw_offload",
    *,
    streamed: bool | Collection[int],
    trainable: tuple[str, ...] = (".",),
    half: tuple[str, ...] = (),
    **changes: Any,
) -> DdpEngine:
    """Return the engine of a small transformer; streamed: all blocks, none, or those of these numbers."""
    model = network(name, torch.bfloat16 if "bf16" in optimizer else torch.float32, **changes)
    names = choose_trainable(model, trainable, half)
    blocks = blocks_of(model)
    numbers = streamed if isinstance(streamed, Collection) else range(len(blocks))
    stream = stream_trained(blocks, numbers, CPU) if streamed else None

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


@pytest.mark.parametrize(
    "name", ["joint", *(pytest.param(name, marks=pytest.mark.slow) for name in ("text", "image"))]
)
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
        ("text", "adamw_bf16_offload"),
        pytest.param("joint", "adamw_offload", marks=pytest.mark.slow),
        pytest.param("image", "adamw_offload", marks=pytest.mark.slow),
        pytest.param("joint, first frame replaced", "adamw_bf16_offload", marks=pytest.mark.slow),
    ],
)
def test_ten_clipped_steps_equal_those_of_resident_blocks(
    accelerator: Accelerator, name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda step, **_: step
    )  # torchao's step is compiled for each shape otherwise
    resident, streamed = (engine_of(accelerator, name, optimizer, streamed=streamed) for streamed in (False, True))
    found, expected = (train(accelerator, engine, name, range(10)) for engine in (streamed, resident))
    assert found == expected
    assert [applied for *_, applied in found] == [step != 2 for step in range(10)]
    assert all(norm > 0.05 for _, norm, _ in found)  # every step is clipped
    assert_equal(dict(streamed.network.state_dict()), dict(resident.network.state_dict()))
    assert_equal(saved(streamed), saved(resident))


def saved(engine: DdpEngine) -> dict[str, Tensor]:
    """Return copies of weights and moments."""
    return {f"{kind} of {name}": values.clone() for kind, name, values in engine.saved_tensors()}


@pytest.mark.parametrize("keep", ["attention", pytest.param("", marks=pytest.mark.slow)])
def test_some_blocks_and_some_parameters_may_be_streamed_and_trained(accelerator: Accelerator, keep: str) -> None:
    """Three of four blocks are streamed; in one of them nothing is trained, and two learning rates are used."""
    settings: dict[str, Any] = {"trainable": ("attn1", "patch_embedding"), "half": ("blocks.1.ffn",), "num_layers": 4}
    resident, streamed = (
        engine_of(accelerator, streamed=numbers, keep=keep, **settings) for numbers in (False, (0, 1, 3))
    )
    for engine in (resident, streamed):
        engine.network.blocks[3].requires_grad_(False)
    assert train(accelerator, streamed, "text", range(2)) == train(accelerator, resident, "text", range(2))
    assert_equal(saved(streamed), saved(resident))


@pytest.mark.parametrize("first", ["streamed", pytest.param("resident", marks=pytest.mark.slow)])
def test_either_engine_resumes_the_checkpoints_of_the_other(
    accelerator: Accelerator, tmp_path: Path, first: str
) -> None:
    begun = engine_of(accelerator, streamed=first == "streamed")
    train(accelerator, begun, "text", range(1), micro_batches=1)
    begun.save(tmp_path, TrainState(seed=0, slots=1, index="", settings={}, run=""))
    expected = train(accelerator, begun, "text", range(3, 5), micro_batches=1)
    for streamed in (False, True):
        resumed = engine_of(accelerator, streamed=streamed)
        micro_batch(accelerator, resumed, "text", 0)  # leaves other weights in the buffers
        resumed.zero_grad()
        resumed.load(tmp_path)
        assert train(accelerator, resumed, "text", range(3, 5), micro_batches=1) == expected
        assert_equal(saved(resumed), saved(begun))


def test_an_ema_in_host_memory_is_the_same_and_is_validated(accelerator: Accelerator) -> None:
    """Also where a pass without gradients follows: the blocks on the device are those of the EMA, then of the run."""
    found = []
    for streamed in (False, True):
        engine = engine_of(accelerator, streamed=streamed, num_layers=4)
        with_ema = EmaEngine(engine, is_main=True, decay=0.5, device=CPU, full_weights_bytes=0)
        for step in range(2):
            micro_batch(accelerator, engine, "text", step)
            with_ema.update(loss=torch.ones(()), empty=False, limit=lambda norm: norm)
        outputs = [output_of(engine)]
        with with_ema.ema_weights():
            outputs.append(output_of(engine))
        outputs.append(output_of(engine))
        assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
        found.append({**dict(with_ema.ema.shards), **{str(n): output for n, output in enumerate(outputs)}})
    assert_equal(found[1], found[0])


def output_of(engine: DdpEngine) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return engine.network(**inputs_of("text", 7))[0]


def test_a_step_that_is_skipped_or_dropped_leaves_nothing_behind(accelerator: Accelerator) -> None:
    resident, streamed = (engine_of(accelerator, streamed=streamed) for streamed in (False, True))
    before = saved(streamed)
    for engine in (resident, streamed):
        micro_batch(accelerator, engine, "text", 5)
        engine.zero_grad()  # as after the test of the largest micro-batch
        micro_batch(accelerator, engine, "text", 6)
        update = engine.update(loss=torch.ones(()), empty=True, limit=lambda norm: norm)
        assert not update.applied
    assert_equal(saved(streamed), before)
    assert train(accelerator, streamed, "text", range(1)) == train(accelerator, resident, "text", range(1))


def test_streamed_parameters_stay_where_they_are(accelerator: Accelerator) -> None:
    engine = engine_of(accelerator, streamed=True)
    parameters = dict(engine.network.named_parameters())
    engine.network.to(torch.float64)
    now = dict(engine.network.named_parameters())
    kept = {name for name in now if now[name] is parameters[name] and now[name].dtype == torch.float32}
    assert kept == {name for name in now if name.startswith("blocks.")} != now.keys()


def test_at_most_two_blocks_are_on_the_device_and_gradients_leave_before_the_next_block(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(accelerator, "joint", streamed=True)
    assert isinstance(engine, StreamedEngine)
    stream = engine._stream
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

    stream.weights.record = check
    order: list[int] = []
    add = stream.gradients.add

    def noted(number: int, *others: Any) -> None:
        order.append(number)
        add(number, *others)

    monkeypatch.setattr(stream.gradients, "add", noted)
    micro_batch(accelerator, engine, "joint", 0)
    assert order == [*range(5)][::-1]
    assert len(alive) == 2 and stream.weights._buffers[0].numel() == max(map(Tensor.numel, stream.weights._memory))
    assert all(p.device == CPU for p in stream.parameters)


SLOW_MUTANTS = ("no wait", "gradients are not waited for")


@pytest.mark.parametrize(
    "mutant",
    ["no forget", "gradients are replaced", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MUTANTS)],
)
def test_a_wait_that_is_left_out_changes_the_losses(
    accelerator: Accelerator, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each of these the tests above fail."""
    expected = train(accelerator, engine_of(accelerator, streamed=False), "text", range(2), micro_batches=1)
    engine = engine_of(accelerator, streamed=True)
    assert isinstance(engine, StreamedEngine)
    if mutant == "no wait":
        monkeypatch.setattr(WeightCopies, "wait", lambda self: None)
    elif mutant == "no forget":
        monkeypatch.setattr(engine._stream.weights, "forget", lambda: None)
    elif mutant == "gradients are not waited for":
        monkeypatch.setattr(engine._stream.gradients, "wait", lambda: None)
    else:  # gradients of the next block replace those that have not left
        wait = engine._stream.gradients._copies.wait
        monkeypatch.setattr(engine._stream.gradients._copies, "wait", lambda: None)
        monkeypatch.setattr(engine._stream.gradients, "wait", wait)
    assert train(accelerator, engine, "text", range(2), micro_batches=1) != expected
