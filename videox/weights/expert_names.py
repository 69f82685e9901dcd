"""Names of the experts of a model with two transformers, each for a window of noise. Imports no torch."""

from __future__ import annotations

from pathlib import Path

TRANSFORMER = "transformer"  # name of the weights in training inside a checkpoint; the EMA has another name
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}  # the folder of each in diffusers' layout


def exported_name(name: str, expert: str | None) -> str:
    """Return the name of exported weights: that of the expert's folder in place of transformer.

    Args:
        name: TRANSFORMER, or a name that begins with it.
        expert: a key of EXPERTS; None for a model with one transformer.
    """
    return EXPERTS.get(expert or "", TRANSFORMER) + name.removeprefix(TRANSFORMER)


def lora_stem(stem: str, expert: str | None) -> str:
    """Return the stem of a LoRA file, which names the expert; None for a model with one transformer."""
    return f"{stem}_{expert}" if expert else stem


def both_experts(folder: Path, stem: str) -> dict[str, Path]:
    """Return the place of each expert in a folder that has both; {} for any other path.

    It is the output folder of --expert both, a folder with two LoRA files, or a model or a folder with two exports.

    Args:
        stem: of a LoRA file without the name of its expert.
    """
    kinds = (
        {expert: folder / expert for expert in EXPERTS},
        {expert: folder / f"{lora_stem(stem, expert)}.safetensors" for expert in EXPERTS},
        {expert: folder / name for expert, name in EXPERTS.items()},
        {expert: folder / f"{expert}_model" for expert in EXPERTS},
    )
    return next((places for places in kinds if all(path.exists() for path in places.values())), {})
