"""Serves whoever names a model by its id on the Hugging Face hub: what training needs of it, in a folder here."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from videox.errors import MODEL, UserError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Everything that some layout of some family needs, and none of the pictures, pickles and papers beside it.
DIFFUSERS = [
    f"{folder}/{kind}"
    for folder in (
        "scheduler",
        "tokenizer*",
        "text_encoder*",
        "vae",
        "transformer",
        "image_encoder",
        "image_processor",
    )
    for kind in ("*.json", "*.safetensors", "*.txt", "*.model")
]
ORIGINAL = [
    "config.json", "diffusion_pytorch_model*", "Wan2.1_VAE.pth", "models_t5_*.pth", "models_clip_*.pth",
    "google/umt5-xxl/*",
]  # fmt: skip
NEEDED = ["model_index.json", *DIFFUSERS, *ORIGINAL]


@cache
def local_folder(name: str, flag: str = "--pretrained_model_name_or_path") -> Path:
    """Returns a model's folder: the one that is named, or what the hub has under this id, fetched once and kept.

    Offline (HF_HUB_OFFLINE=1, or no network) what was fetched before is used.

    Args:
        name: a path, or an id such as Wan-AI/Wan2.1-T2V-14B.
        flag: that it was given by, for the refusal.

    Raises:
        UserError: (MODEL) neither here nor to be had; one line with the cause.
    """
    if Path(name).exists() or not ID.fullmatch(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as why:
        cause = " ".join(str(why).split())[:300]
        what = f"{name} is not a folder here, and could not be had from the hub ({type(why).__name__}: {cause})"
        hint = "give the folder of the model, or an id of the hub that this machine can reach or has fetched before"
        raise UserError(flag, what, hint, MODEL) from why
