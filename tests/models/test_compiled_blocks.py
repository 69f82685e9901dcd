"""Tests of videox.models.compiled_blocks: graphs, recompilations, closeness to uncompiled blocks, and the fallback."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch.fx.experimental._config as shape_config
from networks import SMALL_CONFIGS, blocks_of, build_transformer, model_inputs
from torch import Tensor
from torch._dynamo.utils import counters

from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.activation_offload import HostOffload
from videox.models.compiled_blocks import compile_blocks
from videox.models.recompute import Recompute

CONFIGS = [(shape_config, "use_duck_shape"), (dynamo_config, "recompile_limit"), (dynamo_config, "optimize_ddp"),
           (functorch_config, "force_non_lazy_backward_lowering")]  # fmt: skip
MOST_GRAPHS = {"text": 1, "image": 1, "joint": 6, "joint, first frame replaced": 6}
SHAPES = [
    (side, frames, text)
    for side in (4, 6, 8, 10, 12)
    for frames, text in ((1, 5), (2, 7), (3, 16), (5, 9), (4, 12), (2, 8))
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """compile_blocks changes settings of torch for the whole process."""
    before = [getattr(config, name) for config, name in CONFIGS]
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    for (config, name), value in zip(CONFIGS, before, strict=True):
        setattr(config, name, value)


def gradients(model: Any, given: dict[str, Any], *, half: bool = False) -> Tensor:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        prediction = model(**given)[0]
    prediction.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def pair(name: str, backend: str, notes: list[str], **changes: int) -> tuple[Any, Any]:
    """Return an uncompiled and a compiled transformer with equal weights; changes: of the configuration."""
    plain: Any = build_transformer({**SMALL_CONFIGS[name], **changes}).train()
    compiled = copy.deepcopy(plain)
    compile_blocks(blocks_of(compiled), notes.append, backend)
    return plain, compiled


def text_of(name: str, text: int) -> int:
    return 512 if SMALL_CONFIGS[name].get("image_dim") else text


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["none", "", "attention"])
@pytest.mark.parametrize("name", MOST_GRAPHS)
def test_thirty_sizes_need_no_graph_after_the_second_one(name: str, keep: str) -> None:
    """Graphs are those of torch's tracing, which does not depend on the compiler behind it."""
    notes: list[str] = []
    plain, compiled = pair(name, "aot_eager", notes)
    if keep != "none":
        checkpoint_blocks(compiled, blocks_of(compiled), lambda *_: Recompute(1.0, keep))
    assert len(SHAPES) == 30
    after_two = 0
    for number, (side, frames, text) in enumerate(SHAPES):
        given, _ = model_inputs(SMALL_CONFIGS[name], text_of(name, text), side, frames)
        assert difference(gradients(compiled, given), gradients(plain, given)) < 1e-5
        if number == 1:
            after_two = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == after_two <= MOST_GRAPHS[name]
    assert not counters["graph_break"] and not notes


@pytest.mark.slow
def test_images_and_clips_share_a_graph() -> None:
    """Clips come first, so that an image is the first sample with a dimension of one frame."""
    notes: list[str] = []
    plain, compiled = pair("text", "aot_eager", notes)
    for side, frames, text in ((4, 2, 5), (6, 3, 7), (8, 1, 9), (4, 1, 6)):
        given, _ = model_inputs(SMALL_CONFIGS["text"], text, side, frames)
        assert difference(gradients(compiled, given), gradients(plain, given)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and not notes


@pytest.mark.slow
def test_both_forward_passes_of_an_offloaded_block_share_a_graph() -> None:
    """The inputs that come back from the host for the second one are no views, unlike those of the first one."""
    notes: list[str] = []
    plain, compiled = pair("text", "aot_eager", notes)
    checkpoint_blocks(compiled, blocks_of(compiled), lambda *_: Recompute(1.0), HostOffload(torch.device("cpu")))
    for side, frames, text in ((4, 2, 5), (6, 3, 7)):
        given, _ = model_inputs(SMALL_CONFIGS["text"], text, side, frames)
        assert difference(gradients(compiled, given), gradients(plain, given)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and not notes


@pytest.mark.slow
@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("keep", ["none", "", "attention", "offload"])
@pytest.mark.parametrize("name", ["text", "joint"])
def test_gradients_of_compiled_kernels_are_close(name: str, keep: str, half: bool) -> None:
    notes: list[str] = []
    plain, compiled = pair(name, "inductor", notes)
    if keep != "none":
        offload = HostOffload(torch.device("cpu")) if keep == "offload" else None
        recompute = Recompute(1.0, keep if keep == "attention" else "")
        checkpoint_blocks(compiled, blocks_of(compiled), lambda *_: recompute, offload)
    for side, frames, text in ((8, 2, 9), (16, 3, 7), (12, 1, 12)):
        given, _ = model_inputs(SMALL_CONFIGS[name], text, side, frames)
        exact, ours = gradients(plain, given), gradients(compiled, given, half=half)
        if half:  # a fused kernel rounds to bf16 at other places: compare how far both are from float32
            assert difference(ours, exact) < 1.2 * difference(gradients(plain, given, half=True), exact)
        else:
            assert difference(ours, exact) < 1e-3
    assert not notes


@pytest.mark.slow
def test_a_graph_is_shared_by_all_blocks() -> None:
    """One size, traced and not compiled to kernels."""
    notes: list[str] = []
    plain, compiled = pair("text", "aot_eager", notes, num_layers=2)
    given, _ = model_inputs(SMALL_CONFIGS["text"], 8, side=4, frames=2)
    assert difference(gradients(compiled, given), gradients(plain, given)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and not notes
    assert plain.state_dict().keys() == compiled.state_dict().keys()


@pytest.mark.parametrize("recomputed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_compiler_that_fails_is_noted_once_and_the_blocks_run(recomputed: bool) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise OSError("no compiler\nwas found")

    notes: list[str] = []
    plain, compiled = pair("text", broken, notes)  # type: ignore[arg-type]
    if recomputed:
        checkpoint_blocks(compiled, blocks_of(compiled), lambda *_: Recompute(1.0, "attention"))
    given, _ = model_inputs(SMALL_CONFIGS["text"], 8, side=4, frames=2)
    for _ in range(2):
        assert torch.equal(gradients(compiled, given), gradients(plain, given))
    (line,) = notes
    assert line.startswith("--compile: ") and "no compiler was found" in line and "\n" not in line


@pytest.mark.slow
def test_a_kernel_that_fails_at_its_first_run_is_noted() -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*given: Tensor) -> None:
            raise RuntimeError("the driver is too old")

        return run

    notes: list[str] = []
    plain, compiled = pair("text", broken, notes)  # type: ignore[arg-type]
    given, _ = model_inputs(SMALL_CONFIGS["text"], 8, side=4, frames=2)
    assert torch.equal(gradients(compiled, given), gradients(plain, given))
    assert len(notes) == 1 and "the driver is too old" in notes[0]


@pytest.mark.slow
def test_out_of_memory_is_no_failure_of_the_compiler() -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*given: Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    notes: list[str] = []
    _, compiled = pair("text", broken, notes)  # type: ignore[arg-type]
    given, _ = model_inputs(SMALL_CONFIGS["text"], 8, side=4, frames=2)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(compiled, given)
    assert not notes
