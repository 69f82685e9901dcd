"""Tensor dumps for --dump_steps: write every tensor of a micro-batch to a file, without changing the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from videox.data.dataset import Batch
from videox.files import mode_of_umask


def dump_folder(output_dir: Path, step: int, dump_steps: Sequence[int]) -> Path | None:
    """Return the folder for the tensors of an optimizer step (from 1), None if the step is not in dump_steps."""
    return output_dir / "dump" / f"step-{step}" if step in dump_steps else None


def write_dump(
    folder: Path | None, rank: int, batch: Batch, model_inputs: Mapping[str, object], **tensors: torch.Tensor
) -> Path | None:
    """Write rank-R-micro-M.safetensors and return its path; do nothing if folder is None.

    Args:
        folder: output_dir/dump/step-N, N counted from 1; created if it does not exist.
        rank: rank of this process.
        batch: the micro-batch. Its pixels are stored as a tensor; its rows, frame_indices, captions (after dropout)
            and bucket are stored as JSON strings in the file's metadata.
        model_inputs: keyword arguments of the transformer's forward; tensors among them are stored as model.<name>.
        tensors: latents, noise, sigma, timestep, weight, target, prediction, loss.
    """
    if folder is None:
        return None
    path = folder / f"rank-{rank}-micro-{batch['micro']}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {f"model.{name}": value for name, value in model_inputs.items() if isinstance(value, torch.Tensor)}
    # copy: safetensors rejects tensors that share memory, and views must not be written as they are
    stored = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in {"pixels": batch["pixels"], **tensors, **inputs}.items()
    }
    header = {name: json.dumps(batch[name]) for name in ("rows", "frame_indices", "captions", "bucket")}
    with mode_of_umask(path):
        save_file(stored, path, metadata=header)
    return path
