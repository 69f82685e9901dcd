"""Tests of videox.estimate.traffic: the bytes of a block's small operators against those that a fake GPU runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import tiny
from rehearsals import CUDA, build_guard, skip_unless_possible

from videox.estimate.traffic import Traffic, cross_attention_traffic, joint_attention_traffic

DIM, FFN, SIDE, FRAMES, TEXT = 1536, 8960, 32, (4, 8), (256, 512)
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 64, "freq_dim": 256, "ffn_dim": FFN, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 12, "attention_head_dim": 128, "num_refiner_layers": 1,
    "mlp_ratio": 4.0, "guidance_embeds": True, "text_embed_dim": 64, "pooled_projection_dim": 64,
    "rope_axes_dim": (16, 56, 56),
}  # fmt: skip
WAN_CLASS, HUNYUAN_CLASS = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"
# Class, and configurations that differ by one block.
BLOCKS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any], Traffic]] = {
    "cross-attention": (
        WAN_CLASS, {**WAN, "num_layers": 1}, {**WAN, "num_layers": 2}, cross_attention_traffic(DIM, FFN, TEXT[1]),
    ),
    "joint, two streams": (
        HUNYUAN_CLASS, {**HUNYUAN, "num_layers": 1, "num_single_layers": 1},
        {**HUNYUAN, "num_layers": 2, "num_single_layers": 1}, joint_attention_traffic(DIM, 4.0, TEXT[1], single=False),
    ),
    "joint, one stream": (
        HUNYUAN_CLASS, {**HUNYUAN, "num_layers": 1, "num_single_layers": 1},
        {**HUNYUAN, "num_layers": 1, "num_single_layers": 2}, joint_attention_traffic(DIM, 4.0, TEXT[1], single=True),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def counted() -> dict[str, list[list[int]]]:
    """For each kind of block, the bytes of both passes: of the few and the many latents, and of less text."""
    skip_unless_possible()
    sizes = [(FRAMES[0], TEXT[1]), (FRAMES[1], TEXT[1]), (FRAMES[0], TEXT[0])]
    cases = [
        (name, config, frames, SIDE, text)
        for name, *configs, _ in BLOCKS.values()
        for frames, text in sizes
        for config in configs
    ]
    guard = str(build_guard())
    environment = {**os.environ, "LD_PRELOAD": guard, "PYTHONPATH": os.pathsep.join(map(str, (CUDA, tiny.ROOT)))}
    command = [sys.executable, str(CUDA / "count_bytes.py"), guard]
    run = subprocess.run(
        command, input=json.dumps(cases), env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = iter(json.loads(run.stdout))
    return {
        block: [[more - less for less, more in zip(next(found), next(found), strict=True)] for _ in sizes]
        for block in BLOCKS
    }


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_the_bytes_of_a_block_are_those_of_its_operators(block: str, counted: dict[str, list[list[int]]]) -> None:
    """The slopes by latents and by text, in which the casts of weights drop out."""
    few, many, less_text = counted[block]
    tokens = (FRAMES[1] - FRAMES[0]) * (SIDE // 2) ** 2
    for number, error in enumerate((0.01, 0.05)):  # of the forward and of the backward pass
        expected = BLOCKS[block][3].eager[number]
        by_latents = (many[number] - few[number]) / tokens
        by_text = (few[number] - less_text[number]) / (TEXT[1] - TEXT[0])
        assert by_latents == pytest.approx(expected.linear, rel=error)
        # Wan's blocks add up the gradients of the text, 6 bytes per channel, which the model leaves out
        assert by_text == pytest.approx(expected.constant / TEXT[1], rel=0.06, abs=6.1 * DIM)
