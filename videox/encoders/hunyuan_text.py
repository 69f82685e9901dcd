"""HunyuanVideo's text encoders, with padding removed, so that attention needs no mask if all tokens are real."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from videox.encoders.encode import EncoderInput, LazyEncoders
from videox.encoders.vae import to_images

TEXT_MULTIPLE = 32  # tokens


def trim_text(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and mask cut to the batch's longest text; the model's output does not change.

    A text without any real token keeps its first one: with a mask of zeros the model's mean over the text would divide
    by zero.

    Args:
        embeds: [B, L, D].
        mask: [B, L], the first tokens of each row 1, the rest 0.

    Returns:
        [B, longest, D] and [B, longest] float32.
    """
    mask = mask.clone().float()
    mask[:, 0] = 1
    longest = int(mask.sum(1).max())
    return embeds[:, :longest], mask[:, :longest]


@torch.no_grad()
def encode_text(encoders: LazyEncoders[Any], settings: Mapping[str, int], inputs: EncoderInput) -> list[torch.Tensor]:
    """Return Llama's embeddings [L, D] of each caption, without padding, as the pipeline computes them.

    Each caption is encoded alone: its embedding must be bit-identical whatever the other captions are.

    Args:
        encoders: of the family, with `text_encoder` and diffusers' `pipeline`; loaded on first use.
        settings: keyword arguments of the pipeline's function; with `image_embed_interleave` it is image-to-video.
        inputs: captions, and the video whose first frame is part of an image-to-video prompt.
    """
    encoder, pipeline = encoders().text_encoder, encoders().pipeline
    # Each pipeline's module has its own template: image-to-video prompts have a place for the image.
    template = sys.modules[type(pipeline).__module__].DEFAULT_PROMPT_TEMPLATE
    encode = partial(pipeline._get_llama_prompt_embeds, device=encoder.device, **settings)
    images: list[list[Any]] = [[] for _ in inputs.captions]
    if "image_embed_interleave" in settings:
        images = [[[image]] for image in to_images(inputs.video[:, :, 0])]
    with encoder.on_device():
        encoded = [encode(*image, [text], template) for image, text in zip(images, inputs.captions, strict=True)]
    return [trim_text(embeds, mask)[0][0] for embeds, mask in encoded]


@torch.no_grad()
def encode_pooled(encoders: LazyEncoders[Any], inputs: EncoderInput) -> torch.Tensor:
    """Return CLIP's pooled embeddings [B, P], each caption encoded alone; encoders: with `text_encoder_2`."""
    encoder, pipeline = encoders().text_encoder_2, encoders().pipeline
    with encoder.on_device():
        pooled = [pipeline._get_clip_prompt_embeds([text], device=encoder.device) for text in inputs.captions]
    return torch.cat(pooled)


def pad_texts(texts: Sequence[torch.Tensor], multiple: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings [B, L, D], zeros after each text's end, and their float32 mask [B, L] on the CPU.

    L is padded_length of the texts' lengths. The model's output does not depend on it: the mask excludes the padding.

    Args:
        texts: embeddings [length, D] of each text, all of whose tokens are real.
        multiple: as for padded_length.
    """
    lengths = [len(text) for text in texts]
    length = padded_length(lengths, multiple, on_gpu=texts[0].device.type == "cuda")
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).float()
    embeds = pad_sequence(list(texts), batch_first=True)
    missing = length - embeds.shape[1]
    return (torch.nn.functional.pad(embeds, (0, 0, 0, missing)) if missing else embeds), mask


def padded_length(lengths: Sequence[int], multiple: int | None, *, on_gpu: bool) -> int:
    """Return the number of text tokens of a micro-batch: the longest text's, rounded up.

    cuDNN's attention builds a plan for each new length, which takes up to a second, and captions have many lengths.
    Rounded up, they have few. But padding needs a mask, which slows attention down: texts of one length, which need
    none, keep theirs by default. Which of both costs less can be measured on a GPU alone.

    Args:
        lengths: tokens of each text.
        multiple: round up to a multiple of it; None: to TEXT_MULTIPLE on a GPU if the lengths differ, else not at all.
        on_gpu: the model runs on a GPU.
    """
    if multiple is None:
        multiple = TEXT_MULTIPLE if on_gpu and min(lengths) < max(lengths) else 1
    return -(-max(lengths) // multiple) * multiple
