"""Loads the frozen encoders of a run: text encoders in --text_encoder_precision, each once per machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from videox.models.base_precision import BF16, QUANTISED_ENCODER
from videox.models.configured import Component
from videox.models.folder import load_class
from videox.models.quantised_text import prepare_quantised, quantise_text_encoder
from videox.models.shared_memory import load_frozen
from videox.training.context import Gather


def load(
    args: argparse.Namespace,
    accelerator: Accelerator,
    gather: Gather,
    name: str,
    class_name: str,
    component: Component,
    dtype: torch.dtype,
) -> nn.Module:
    """Return a frozen encoder in host memory, as load_frozen; a collective.

    The text encoder is quantised with --text_encoder_precision, which prints the error of that. A second, small text
    encoder (CLIP) stays in the dtype of computation.

    Args:
        gather: a collective that returns every process's value.
        name: of the component.
        class_name: with its package, such as "diffusers.AutoencoderKLWan".
        component: its files.
        dtype: of its weights.

    Raises:
        UserError: as load_frozen.
    """
    change = None
    if name == QUANTISED_ENCODER and args.text_encoder_precision != BF16:
        change = _quantise(args.text_encoder_precision, dtype, accelerator)
    pinned = args.low_vram and accelerator.device.type == "cuda"
    return load_frozen(load_class(class_name), component, dtype, pinned=pinned, gather=gather, change=change)


def _quantise(precision: str, dtype: torch.dtype, accelerator: Accelerator) -> Callable[[nn.Module, bool], None]:
    def change(model: nn.Module, fill: bool) -> None:
        if not fill:
            prepare_quantised(model, precision, dtype)
            return
        error = quantise_text_encoder(model, precision, dtype, accelerator.device)
        accelerator.print(f"text       {precision}: {error}", flush=True)

    return change


def text_settings(args: argparse.Namespace, settings: object) -> str:
    """Return what embeddings depend on besides the weights, for their key in the cache.

    In bf16 it is `settings` as it always was: caches of earlier versions are read.
    """
    precision = args.text_encoder_precision
    return f"{settings}" if precision == BF16 else f"{settings}, text encoder in {precision}"
