"""Resolves a Hugging Face Hub id to a local folder with the files that training needs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from videox.errors import MODEL, UserError
from videox.models.downloads import HUB_CACHE, download_hint
from videox.weights.safetensors_io import join_first

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
        "transformer_2",
        "image_encoder",
        "image_processor",
    )
    for kind in ("*.json", "*.safetensors", "*.txt", "*.model")
]
ORIGINAL_PATTERNS = [
    "config.json", "diffusion_pytorch_model*", "Wan2.?_VAE.pth", "models_t5_*.pth", "models_clip_*.pth",
    "google/umt5-xxl/*", "high_noise_model/*", "low_noise_model/*",
]  # fmt: skip
ALLOW_PATTERNS = ["model_index.json", *DIFFUSERS_PATTERNS, *ORIGINAL_PATTERNS]


@cache
def local_folder(name: str, flag: str = "--pretrained_model_name_or_path") -> Path:
    """Return a model's local folder: the path itself, or the Hub's files for this id, downloaded once and cached.

    Of a model's folder in the Hub's cache (models--maker--name), the snapshot of its main branch is returned.

    Offline (HF_HUB_OFFLINE=1, or no network) files that were downloaded before are used.

    Args:
        name: a path, or an id such as Wan-AI/Wan2.1-T2V-14B.
        flag: the flag that it was passed by, for the error message.

    Raises:
        UserError: (MODEL) it neither exists locally nor can be downloaded; one line with the cause. Or it is the Hub's
            cache, and not clear which model or snapshot is meant.
    """
    if Path(name).exists() or not HUB_ID.fullmatch(name):
        return snapshot_folder(Path(name), flag)
    try:
        return Path(snapshot_download(name, allow_patterns=ALLOW_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = " ".join(str(error).split())[:300]
        what = f"{name} is not a local folder and cannot be downloaded from the Hub ({type(error).__name__}: {cause})"
        hint = "pass a model folder, or the id of a Hub model that this machine can download or has in its cache"
        raise UserError(flag, what, hint, MODEL) from error


def snapshot_folder(path: Path, flag: str) -> Path:
    """Return the snapshot in a model's folder of the Hub's cache; any other path is returned unchanged.

    Args:
        path: a path that the user passed.
        flag: the flag that it was passed by, for the error message.

    Raises:
        UserError: (MODEL) it is a cache with several models, or a model's folder without a snapshot, or with several
            of which none is that of the main branch.
    """
    folder = path.parent if path.name == "snapshots" and HUB_CACHE.fullmatch(path.resolve().parent.name) else path
    if (folder / "snapshots").is_dir() and not (folder / "config.json").exists():
        snapshots = sorted(entry for entry in (folder / "snapshots").iterdir() if entry.is_dir())
        reference = folder / "refs/main"
        main = reference.read_text(encoding="utf-8", errors="replace").strip() if reference.is_file() else ""
        chosen = [entry for entry in snapshots if entry.name == main] or snapshots
        if len(chosen) == 1:
            return chosen[0]
        if not chosen:
            what = f"{path} is a model's folder in the Hub's cache, without a snapshot"
            raise UserError(flag, what, download_hint(folder), MODEL)
        what = f"{path} is a model's folder in the Hub's cache with {len(chosen)} snapshots, none is that of refs/main"
        raise UserError(flag, what, f"pass one of them: {join_first([str(entry) for entry in chosen])}", MODEL)
    for parent in (folder, folder / "hub"):
        models = sorted(parent.glob("models--*")) if parent.is_dir() else []
        if models:
            what = f"{path} is a cache of the Hub with {len(models)} models"
            raise UserError(flag, what, f"pass one of them: {join_first([str(model) for model in models])}", MODEL)
    return path
