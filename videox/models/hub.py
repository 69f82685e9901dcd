"""Resolves a Hugging Face Hub id to a local folder with the files that training needs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from videox.errors import MODEL, UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The files that any layout of any family needs, without the repositories' images, pickles and papers.
DIFFUSERS_PATTERNS = [
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
ORIGINAL_PATTERNS = [
    "config.json", "diffusion_pytorch_model*", "Wan2.1_VAE.pth", "models_t5_*.pth", "models_clip_*.pth",
    "google/umt5-xxl/*",
]  # fmt: skip
ALLOW_PATTERNS = ["model_index.json", *DIFFUSERS_PATTERNS, *ORIGINAL_PATTERNS]


@cache
def local_folder(name: str, flag: str = "--pretrained_model_name_or_path") -> Path:
    """Return a model's local folder: the path itself, or the Hub's files for this id, downloaded once and cached.

    Offline (HF_HUB_OFFLINE=1, or no network) files that were downloaded before are used.

    Args:
        name: a path, or an id such as Wan-AI/Wan2.1-T2V-14B.
        flag: the flag that it was passed by, for the error message.

    Raises:
        UserError: (MODEL) it neither exists locally nor can be downloaded; one line with the cause.
    """
    if Path(name).exists() or not HUB_ID.fullmatch(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=ALLOW_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = " ".join(str(error).split())[:300]
        what = f"{name} is not a local folder and cannot be downloaded from the Hub ({type(error).__name__}: {cause})"
        hint = "pass a model folder, or the id of a Hub model that this machine can download or has in its cache"
        raise UserError(flag, what, hint, MODEL) from error
