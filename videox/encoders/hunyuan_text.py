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


def pad_texts(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings [B, longest, D], zeros after each text's end, and their float32 mask [B, longest] on the CPU.

    Args:
        texts: embeddings [L, D] of each text, all of whose tokens are real.
    """
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    return pad_sequence(list(texts), batch_first=True), mask
