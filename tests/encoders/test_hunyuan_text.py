"""Tests of videox.encoders.hunyuan_text: padding is removed from text, and nothing else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.encoders.hunyuan_text import trim_text

DTYPES = st.sampled_from([torch.int64, torch.float32, torch.bool])


@st.composite
def texts(draw: st.DrawFn, minimum: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return embeddings [B, L, D], a mask [B, L] of any dtype, and how many tokens of each row are real."""
    length = draw(st.integers(1, 12))
    real = draw(st.lists(st.integers(min(minimum, length), length), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    embeds = torch.randn(len(real), length, draw(st.integers(1, 4)), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor(real)[:, None]
    return embeds, mask.to(draw(DTYPES)), real


@settings(deadline=None, max_examples=200)
@given(texts())
def test_length_is_that_of_the_longest_text(text: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    embeds, mask, real = text
    trimmed, trimmed_mask = trim_text(embeds, mask)
    longest = max(1, *real)
    assert trimmed.shape == (len(real), longest, embeds.shape[2]) and trimmed_mask.shape == (len(real), longest)


@settings(deadline=None, max_examples=200)
@given(texts())
def test_real_tokens_are_kept_and_no_padding_becomes_real(text: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    embeds, mask, real = text
    trimmed, trimmed_mask = trim_text(embeds, mask)
    assert torch.equal(trimmed, embeds[:, : trimmed.shape[1]]) and trimmed_mask.dtype == torch.float32
    for row, count in enumerate(real):
        assert trimmed_mask[row].tolist() == [float(place < max(1, count)) for place in range(trimmed.shape[1])]


@settings(deadline=None, max_examples=200)
@given(texts(minimum=1))
def test_the_mask_is_all_ones_only_if_lengths_are_equal(
    text: tuple[torch.Tensor, torch.Tensor, list[int]],
) -> None:
    embeds, mask, real = text
    _, trimmed_mask = trim_text(embeds, mask)
    assert bool(trimmed_mask.all()) == (len(set(real)) == 1)


@settings(deadline=None, max_examples=100)
@given(texts())
def test_trimming_is_idempotent_and_does_not_change_its_input(
    text: tuple[torch.Tensor, torch.Tensor, list[int]],
) -> None:
    embeds, mask, _ = text
    before = embeds.clone(), mask.clone()
    once = trim_text(embeds, mask)
    twice = trim_text(*once)
    assert torch.equal(embeds, before[0]) and torch.equal(mask, before[1])
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@settings(deadline=None, max_examples=100)
@given(texts(), st.integers(0, 4))
def test_a_samples_tokens_are_independent_of_its_batch(
    text: tuple[torch.Tensor, torch.Tensor, list[int]], place: int
) -> None:
    embeds, mask, real = text
    row = place % len(real)
    trimmed, trimmed_mask = trim_text(embeds, mask)
    alone, alone_mask = trim_text(embeds[row : row + 1], mask[row : row + 1])
    assert torch.equal(trimmed[row : row + 1, : alone.shape[1]], alone)
    assert trimmed_mask[row].sum() == alone_mask.sum() and alone_mask.all()


def test_a_text_without_real_tokens_keeps_its_first() -> None:
    embeds = torch.arange(24.0).view(2, 4, 3)
    trimmed, mask = trim_text(embeds, torch.zeros(2, 4, dtype=torch.int64))
    assert torch.equal(trimmed, embeds[:, :1]) and mask.tolist() == [[1.0], [1.0]]
