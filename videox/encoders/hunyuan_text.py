"""Serves the HunyuanVideo script: text without its padding, so that attention needs no mask where all is real."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from videox.encoders.encode import EncoderInput
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import to_images


def trim_text(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns embeddings and mask cut to the batch's longest text; the model's output stays what it was.

    A text without any real token keeps its first one: a mask that is zero everywhere would make the model's mean over
    the text a division by zero.

    Args:
        embeds: [B, L, D].
        mask: [B, L], the first tokens of each row 1, the rest 0.

    Returns:
        [B, longest, D] and [B, longest] float32.
    """
    kept = mask.clone().float()
    kept[:, 0] = 1
    longest = int(kept.sum(1).max())
    return embeds[:, :longest], kept[:, :longest]


@torch.no_grad()
def encode_text(
    encoder: OffloadedModule,
    pipeline: Any,  # noqa: ANN401 - of diffusers
    raw: EncoderInput,
    settings: Mapping[str, int],
) -> list[torch.Tensor]:
    """Returns the text encoder's embeddings [L, D] of each caption, without padding, as the pipeline makes them.

    Each is encoded alone: its embedding must not depend on its neighbours, to the last bit.

    Args:
        encoder: part of the pipeline.
        pipeline: of HunyuanVideo.
        raw: captions, and the video whose first frame an image-to-video prompt shows to the encoder.
        settings: keywords of the pipeline's function; with `image_embed_interleave` it is image-to-video.
    """
    template = sys.modules[type(pipeline).__module__].DEFAULT_PROMPT_TEMPLATE  # each pipeline has its own
    encode = partial(pipeline._get_llama_prompt_embeds, device=encoder.device, **settings)
    shown: list[list[Any]] = [[] for _ in raw.captions]
    if "image_embed_interleave" in settings:
        shown = [[[image]] for image in to_images(raw.video[:, :, 0])]
    with encoder.on_device():
        made = [encode(*image, [text], template) for image, text in zip(shown, raw.captions, strict=True)]
    return [trim_text(embeds, mask)[0][0] for embeds, mask in made]


@torch.no_grad()
def encode_pooled(encoder: OffloadedModule, pipeline: Any, raw: EncoderInput) -> torch.Tensor:  # noqa: ANN401 - of diffusers
    """Returns CLIP's pooled embeddings [B, P], each caption encoded alone; as encode_text."""
    with encoder.on_device():
        pooled = [pipeline._get_clip_prompt_embeds([text], device=encoder.device) for text in raw.captions]
    return torch.cat(pooled)


def join_text(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns embeddings [B, longest, D], zeros past each text's end, and their float32 mask [B, longest] on the host.

    Args:
        texts: embeddings [L, D] of each text, all of whose tokens are real.
    """
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    return pad_sequence(list(texts), batch_first=True), mask
