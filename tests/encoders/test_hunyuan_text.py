"""Tests of videox.encoders.hunyuan_text: padding is removed from text, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SMALL_CONFIGS, build_transformer, model_inputs

from videox.encoders.hunyuan_text import TEXT_MULTIPLE, pad_texts, padded_length, trim_text

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


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([None, 1, 32, 64]), st.booleans())
def test_lengths_are_rounded_up_on_a_gpu_where_a_mask_is_needed(
    lengths: list[int], multiple: int | None, on_gpu: bool
) -> None:
    found, longest = padded_length(lengths, multiple, on_gpu=on_gpu), max(lengths)
    step = multiple or (TEXT_MULTIPLE if on_gpu and len(set(lengths)) > 1 else 1)
    assert found % step == 0 and longest <= found < longest + step
    if not on_gpu and multiple is None:
        assert found == longest, "a run on the CPU has the lengths that it always had"


@pytest.mark.parametrize("lengths", [(5,), (5, 9), (40, 33)])
def test_rounding_up_does_not_change_the_output(lengths: tuple[int, ...]) -> None:
    config = SMALL_CONFIGS["joint"]
    model, (inputs, _) = build_transformer(config).double(), model_inputs(config)
    inputs = {name: value.repeat(len(lengths), *[1] * (value.dim() - 1)) if isinstance(value, torch.Tensor) else value
              for name, value in inputs.items()}  # fmt: skip
    inputs = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    texts = [torch.randn(length, config["text_embed_dim"], dtype=torch.float64) for length in lengths]
    outputs = []
    for multiple in (1, TEXT_MULTIPLE):
        embeds, mask = pad_texts(texts, multiple)
        assert embeds.shape[1] == mask.shape[1] == padded_length(lengths, multiple, on_gpu=False)
        assert [int(row.sum()) for row in mask] == list(lengths) and not embeds[mask == 0].any()
        text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        model.zero_grad()
        outputs.append([model(**{**inputs, **text})[0]])
        outputs[-1][0].square().sum().backward()
        outputs[-1].append(model.context_embedder.proj_in.weight.grad.clone())
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-7)  # the timestep embedding is float32
