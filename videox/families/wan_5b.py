"""Wan2.2 TI2V-5B, one transformer for text-to-video and image-to-video: flags, checks and profile; no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.errors import MODEL, UserError
from videox.models.config_files import read_json
from videox.models.configured import Component
from videox.run.checkpoint import read_manifest
from videox.training.argument_parser import number

MODE = "ti2v"  # value of --train_mode
FPS = 24.0  # of the clips that the model was trained on
GUIDANCE = 5.0  # of the sample clips, as Wan's own code
I2V_RATIO = 0.5
OF_EXPERTS = ("expert", "other_transformer_path")  # flags of the models with two transformers


def add_flags(add: Any) -> None:  # noqa: ANN401 - argparse's add_argument
    """Add the flags of this mode."""
    share = "ti2v: share of the clips that are trained from their first frame, the others from text alone"
    add("--i2v_ratio", type=number(float, 0, 1), default=I2V_RATIO, help=f"{share}; drawn for each sample by its key")


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags of this mode, and that its flags are not given in others. Raises UserError."""
    if args.train_mode != MODE:
        if args.i2v_ratio != I2V_RATIO:
            what = f"{args.i2v_ratio:g}: only --train_mode {MODE} trains text-to-video and image-to-video in one run"
            raise UserError("--i2v_ratio", what, "remove the flag")
        return
    for flag in OF_EXPERTS:
        if getattr(args, flag) is not None:
            what = f"{getattr(args, flag)}: Wan2.2 TI2V-5B has one transformer"
            raise UserError(f"--{flag}", what, f"remove the flag, or remove --train_mode {MODE} for the A14B models")


def check_index(root: Path) -> None:
    """Check that a model in diffusers layout takes a timestep for each token. Raises UserError (MODEL)."""
    index = read_json(root / "model_index.json")
    if index.get("expand_timesteps"):
        return
    what = f"{root} has no expand_timesteps in its model_index.json: it is not Wan2.2 TI2V-5B"
    hint = (
        f"remove --train_mode {MODE} and pass --expert"
        if index.get("boundary_ratio")
        else "use scripts/wan2.1/train.py"
    )
    raise UserError(f"--train_mode {MODE}", what, f"{hint}, or pass a TI2V-5B model", MODEL)


def check_components(components: Mapping[str, Component]) -> None:
    """Check that the transformer takes the latents of the VAE and nothing else. Raises UserError (MODEL)."""
    transformer, vae = components["transformer"].config, components["vae"].config
    channels, latents = transformer.get("in_channels"), vae.get("z_dim")
    if channels != latents or transformer.get("image_dim"):
        what = f"the transformer takes {channels} channels, the VAE's latents have {latents}"
        if transformer.get("image_dim"):
            what = "the transformer has an image embedder: it is Wan2.1"
        hint = "use weights of Wan2.2 TI2V-5B for both, or the mode that the transformer is made for"
        raise UserError(f"--train_mode {MODE}", what, hint, MODEL)


def check_resumed(checkpoint: Path | None) -> None:
    """Check that a run of this mode does not continue one of an expert. Raises UserError (MODEL)."""
    stored = read_manifest(checkpoint)["description"].get("expert") if checkpoint else None
    if checkpoint and stored:
        what = f"{checkpoint.name} is of the {stored} expert of a model with two transformers"
        hint = "pass the model and mode that the run began with, or start a new run in another --output_dir"
        raise UserError(f"--train_mode {MODE}", what, hint, MODEL)
