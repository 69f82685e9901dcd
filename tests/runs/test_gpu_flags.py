"""Tests of benchmarks/gpu_flags.py: its computed step is that of the dry run, and the page has its rows."""

from __future__ import annotations

import sys

import pytest
import tiny

from videox.estimate.gpus import GPUS
from videox.estimate.memory import MemorySetup
from videox.estimate.rates import rates_of
from videox.estimate.step_time import StepModel
from videox.shapes import Bucket, token_count

flags = tiny.load_script("benchmarks/gpu_flags.py")
full_step = sys.modules["gpu.full_step"]
CLIP, LARGE = Bucket(9, 64, 96), Bucket(81, 480, 832)


@pytest.mark.parametrize("name", flags.SMALL_MODELS)
def test_the_page_has_the_step_of_the_dry_run(name: str) -> None:
    """All terms but the numbers of parameters come from the module that the dry run uses."""
    config = flags.SMALL_MODELS[name]
    network, tokens, parameters = full_step.network_of(config), token_count(CLIP), full_step.parameters_of(config)
    model, blocks_of = flags.build(config)
    assert parameters.total == sum(p.numel() for p in model.parameters())
    assert parameters.outside == parameters.total - sum(p.numel() for b in blocks_of(model) for p in b.parameters())
    setup = MemorySetup("single", 1, 1, True, 1.0, False, 0, tokens, 1, {}, keep="attention")
    step = StepModel(network, parameters, setup, rates_of(GPUS["h200"], "h200"), compiled=True)
    parts = step.micro_batch(1, tokens, range(len(network.blocks)), "attention").plus(step.optimizer_step(0))
    (found,) = flags.compute(config, CLIP, [flags.FLAGS[-1]], "h200")
    assert found.seconds == pytest.approx(parts.total())
    assert found.mfu == pytest.approx(network.forward_backward(tokens) / parts.total() / 989e12)


def test_flags_save_time_and_memory_as_they_say() -> None:
    computed = flags.compute(flags.MODELS["Wan2.1 1.3B"], LARGE, flags.FLAGS, "h100")
    names = [flag.flags.replace(flags.FULL, "full", 1) for flag in flags.FLAGS]
    found = dict(zip(names, computed, strict=True))
    full, kept, own = (found[f"full{more}"] for more in (
        "", " --gradient_checkpointing_keep attention", " --gradient_checkpointing_keep self_attention",
    ))  # fmt: skip
    assert found["none"].seconds < kept.seconds < own.seconds < full.seconds
    assert found["none"].activations > kept.activations > own.activations > full.activations
    moved = found["full --offload_activations"]
    assert moved.activations < full.activations and moved.host > 0
    assert found["full --compile"].seconds < full.seconds and found["full --compile"].activations == full.activations


@pytest.mark.slow
def test_flags_are_counted_on_the_cpu() -> None:
    rows = flags.count([flag for flag in flags.FLAGS if not flag.compiled])
    assert all(row.difference == 0 for row in rows)
    by_model = {name: [row for row in rows if row.model == name] for name in flags.SMALL_MODELS}
    for counted in by_model.values():
        none, full, kept, own, moved = counted
        assert none.attention == kept.attention < own.attention + 1 <= full.attention + 1
        assert moved.device + moved.host == full.device < own.device <= kept.device < none.device
    assert "bit-identical" in "\n".join(flags.counted_table(rows))


def test_the_committed_page_has_a_row_for_every_flag_and_model() -> None:
    text = (tiny.ROOT / "benchmarks" / "gpu_flags.md").read_text(encoding="utf-8")
    for flag in flags.FLAGS:
        if flag.flags != "none":
            counted = 0 if flag.compiled and "--compiled" not in text else len(flags.SMALL_MODELS)
            assert text.count(f"| `{flag.flags}` |") == counted + len(flags.MODELS), flag.flags
