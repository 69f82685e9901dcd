"""Serves whoever checks a step by hand: --dump_steps writes every tensor of a micro-batch, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from videox.data.dataset import Batch


def dump_folder(output_dir: Path, step: int, dump_steps: Sequence[int]) -> Path | None:
    """Returns where the tensors of an optimizer step (from 1) go, None if it was not asked for."""
    return output_dir / "dump" / f"step-{step}" if step in dump_steps else None


def write_dump(
    folder: Path,
    *,
    rank: int,
    batch: Batch,
    tensors: Mapping[str, torch.Tensor],
    model_inputs: Mapping[str, object],
) -> Path:
    """Writes rank-R-micro-M.safetensors into a folder, which is made, and returns its path.

    Args:
        folder: output_dir/dump/step-N, N counted from 1.
        rank: of this process.
        batch: its pixels and, as JSON strings in the header, rows, frame_indices, captions (after dropout), bucket.
        tensors: latents, noise, sigma, timestep, weight, target, prediction, loss.
        model_inputs: keywords given to the transformer; tensors among them are stored as model.<name>.
    """
    path = folder / f"rank-{rank}-micro-{batch['micro']}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {f"model.{name}": value for name, value in model_inputs.items() if isinstance(value, torch.Tensor)}
    stored = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in {"pixels": batch["pixels"], **tensors, **inputs}.items()
    }
    header = {name: json.dumps(batch[name]) for name in ("rows", "frame_indices", "captions", "bucket")}
    save_file(stored, path, metadata=header)
    return path
