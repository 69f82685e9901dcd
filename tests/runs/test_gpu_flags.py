"""Tests of benchmarks/gpu_flags.py and gpu_steps.py: the computed step agrees with the estimates, the page with it."""

from __future__ import annotations

import sys

import pytest
import tiny

from videox.shapes import Bucket, token_count

flags = tiny.load_script("benchmarks/gpu_flags.py")
steps = sys.modules["gpu_steps"]
CLIP = Bucket(9, 64, 96)


@pytest.mark.parametrize("name", flags.SMALL_MODELS)
def test_a_traced_block_has_the_estimated_flops(name: str) -> None:
    config = flags.SMALL_MODELS[name]
    network, tokens = flags.network_of(config), token_count(CLIP)
    blocks = steps.trace_blocks(config, CLIP)
    assert sum(count for count, _, _ in blocks) == len(network.blocks)
    forward = sum(count * (one.matmul + one.attention) for count, one, _ in blocks)
    assert forward == pytest.approx(sum(block.forward(tokens) for block in network.blocks), rel=0.01)
    for _, forward, backward in blocks:
        assert backward.matmul == pytest.approx(2 * forward.matmul, rel=0.02)
        assert backward.attention == 2.5 * forward.attention  # a fused kernel computes the scores again
        assert 0 < forward.fused < forward.bytes and 0 < backward.fused < backward.bytes
        assert 0 < forward.self_attention <= forward.attention


def test_flags_save_time_and_memory_as_they_say() -> None:
    computed = flags.compute(flags.SMALL_MODELS["Wan2.1"], CLIP, flags.FLAGS, flags.H100)
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
