"""Tests of videox.estimate.activation_choice: as little is recomputed as the memory allows, in every bucket."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CONFIGS

from videox.estimate.activation_choice import CHOICES, choice_lines, choose_recompute
from videox.estimate.flops import Network, cross_attention_network, joint_attention_network
from videox.estimate.memory import Encoders, MemorySetup, Parameters, memory_of
from videox.models.recompute import Recompute, select_blocks
from videox.shapes import Bucket, token_count

WAN = cross_attention_network(CONFIGS["Wan2.1-T2V-1.3B"], text_tokens=512, image_tokens=0, half=True)
HUNYUAN = joint_attention_network(CONFIGS["HunyuanVideo"], text_tokens=256, half=True)
SMALL = Parameters(1_420_000_000, 1_420_000_000, 46_000_000, 40_000_000)
SETUP = MemorySetup(
    "single", 1, 1, half=True, recompute_share=0.0, offload_encoders=True, workers=0, tokens=0, batch=1, zero={}
)
NO_ENCODERS = Encoders({}, 0.0)


def needed(network: Network, choice: Recompute, tokens: int) -> float:
    setup = replace(SETUP, tokens=tokens, recompute_share=choice.share, keep=choice.keep)
    return memory_of(SMALL, network, NO_ENCODERS, setup).of_phases("training", "step")


def recomputed(network: Network, choice: Recompute, tokens: int) -> float:
    return network.recompute(tokens, select_blocks(len(network.blocks), choice.share), choice.keep)


@pytest.mark.parametrize("network", [WAN, HUNYUAN], ids=["cross", "joint"])
@settings(max_examples=25)
@given(tokens=st.integers(256, 80_000), gib=st.floats(10, 300))
def test_the_choice_fits_and_nothing_that_fits_recomputes_less(network: Network, tokens: int, gib: float) -> None:
    limit = gib * 2**30
    chosen = choose_recompute(network, tokens, lambda choice: needed(network, choice, tokens) <= limit)
    fitting = [choice for choice in CHOICES if needed(network, choice, tokens) <= limit]
    if not fitting:
        assert chosen == Recompute(1.0)
        return
    assert chosen in fitting
    assert recomputed(network, chosen, tokens) == min(recomputed(network, choice, tokens) for choice in fitting)


def test_a_card_goes_from_nothing_over_kept_attention_to_everything() -> None:
    """Wan2.1 1.3B at 480p on cards of less and less memory."""
    tokens, found = 32_760, list[str]()
    for gib in range(200, 20, -1):
        limit = gib * 2**30
        choice = str(choose_recompute(WAN, tokens, lambda choice, limit=limit: needed(WAN, choice, tokens) <= limit))
        found += [choice] if not found or found[-1] != choice else []
    assert found[0] == "recompute nothing" and found[-1] == "recompute all blocks"
    assert "recompute all blocks, keep attention" in found and "recompute all blocks, keep self-attention" in found
    assert "recompute 0.125 of the blocks, keep attention" in found


def test_each_choice_has_a_line_with_its_buckets() -> None:
    samples = {Bucket(81, 480, 832): 1, Bucket(17, 480, 832): 2, Bucket(1, 512, 512): 8, Bucket(1, 480, 832): 4}

    def choose(count: int, tokens: int) -> Recompute:
        return Recompute(1.0, "attention") if count * tokens > 10_000 else Recompute()

    lines = choice_lines(samples, choose, 79.6, most=2)
    assert lines == [
        "activation memory, chosen for 79.6 GiB:",
        "  recompute all blocks, keep attention: 1 x 81x480x832, 2 x 17x480x832",
        "  recompute nothing: 8 x 1x512x512, 4 x 1x480x832",
    ]
    assert choice_lines(samples, lambda *_: Recompute(), 24.0, most=1)[1] == (
        "  recompute nothing: 1 x 81x480x832 and 3 smaller ones"
    )
    assert token_count(Bucket(17, 480, 832)) * 2 > 10_000
