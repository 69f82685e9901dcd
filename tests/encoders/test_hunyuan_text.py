"""Serves videox/text.py: text loses its padding, and nothing else of it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.encoders.hunyuan_text import trim_text

DTYPES = st.sampled_from([torch.int64, torch.float32, torch.bool])


@st.composite
def texts(draw: st.DrawFn, fewest: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Returns embeddings [B, L, D], a mask [B, L] of any dtype, and how many tokens of each row are real."""
    length = draw(st.integers(1, 12))
    real = draw(st.lists(st.integers(min(fewest, length), length), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    embeds = torch.randn(len(real), length, draw(st.integers(1, 4)), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor(real)[:, None]
    return embeds, mask.to(draw(DTYPES)), real


@settings(deadline=None, max_examples=200)
@given(texts())
def test_it_is_as_long_as_the_longest_text(text: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    embeds, mask, real = text
    kept, kept_mask = trim_text(embeds, mask)
    longest = max(1, *real)
    assert kept.shape == (len(real), longest, embeds.shape[2]) and kept_mask.shape == (len(real), longest)


@settings(deadline=None, max_examples=200)
@given(texts())
def test_every_real_token_stays_and_no_other_becomes_real(text: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    embeds, mask, real = text
    kept, kept_mask = trim_text(embeds, mask)
    assert torch.equal(kept, embeds[:, : kept.shape[1]]) and kept_mask.dtype == torch.float32
    for row, count in enumerate(real):
        assert kept_mask[row].tolist() == [float(place < max(1, count)) for place in range(kept.shape[1])]


@settings(deadline=None, max_examples=200)
@given(texts(fewest=1))
def test_the_mask_masks_something_only_where_lengths_differ(
    text: tuple[torch.Tensor, torch.Tensor, list[int]],
) -> None:
    embeds, mask, real = text
    _, kept_mask = trim_text(embeds, mask)
    assert bool(kept_mask.all()) == (len(set(real)) == 1)


@settings(deadline=None, max_examples=100)
@given(texts())
def test_trimming_twice_is_trimming_once_and_leaves_its_input_alone(
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
def test_a_samples_tokens_do_not_depend_on_its_batch(
    text: tuple[torch.Tensor, torch.Tensor, list[int]], place: int
) -> None:
    embeds, mask, real = text
    row = place % len(real)
    kept, kept_mask = trim_text(embeds, mask)
    alone, alone_mask = trim_text(embeds[row : row + 1], mask[row : row + 1])
    assert torch.equal(kept[row : row + 1, : alone.shape[1]], alone)
    assert kept_mask[row].sum() == alone_mask.sum() and alone_mask.all()


def test_a_text_without_a_real_token_keeps_its_first() -> None:
    embeds = torch.arange(24.0).view(2, 4, 3)
    kept, mask = trim_text(embeds, torch.zeros(2, 4, dtype=torch.int64))
    assert torch.equal(kept, embeds[:, :1]) and mask.tolist() == [[1.0], [1.0]]
