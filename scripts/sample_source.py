"""The weights that scripts/sample.py samples, and what the run they belong to recorded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zero_to_bf16 import find_full_weights

from videox.engine.ema import EMA_FOLDER
from videox.errors import FLAGS, MODEL, UserError
from videox.lora.reader import STEM, lora_file
from videox.models.config_files import read_json
from videox.run.checkpoint import MANIFEST, latest_checkpoint, read_manifest, verify
from videox.weights.deepspeed_reader import tag_folder
from videox.weights.expert_names import EXPERTS, both_experts, exported_name
from videox.weights.fsdp_reader import fsdp_folder
from videox.weights.safetensors_io import join_first


@dataclass(frozen=True)
class Source:
    """What is sampled, and what its run recorded.

    Attributes:
        weights: folder or file of a transformer; None = that of the base model.
        lora: file of a LoRA; None = none.
        base: base model.
        step: optimizer steps of the weights, 0 if not known.
        asked: flags of the run, empty without one.
        resolved: values that followed from them.
        other: weights or LoRA of the other expert; None = as the run had them.
    """

    weights: Path | None
    lora: Path | None
    base: str
    step: int = 0
    asked: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    other: Path | None = None


def find_source(flags: argparse.Namespace) -> Source:
    """Find the weights that the command line names, and the run that they belong to. Raises UserError (MODEL)."""
    source: Path = flags.source
    if not source.exists():
        raise UserError("source", f"{source} does not exist", "pass a run, a checkpoint, an export or a LoRA", MODEL)
    if (source / "model_index.json").is_file():
        return Source(None, None, str(source))
    if both := both_experts(source, STEM):
        return source_of_both(flags, both)
    record = next(
        (p / "args.json" for p in (source, *source.absolute().parents[:2]) if (p / "args.json").is_file()), None
    )
    asked, resolved = ({}, {}) if record is None else (read_json(record)[key] for key in ("asked", "resolved"))
    base = flags.base or asked.get("pretrained_model_name_or_path")
    if not base:
        what = f"{source} does not belong to a run, so that its base model is not known"
        raise UserError("--base", what, "pass the model folder or Hub id", FLAGS)
    place, step = weights_of_run(source, flags.ema) if source.is_dir() else (source, 0)
    if (lora := lora_file(place)) is not None:
        return Source(None, lora, base, step, asked, resolved)
    return Source(place, None, base, step, asked, resolved)


def source_of_both(flags: argparse.Namespace, both: dict[str, Path]) -> Source:
    """Find the weights of both experts: one of them as the source, the other one beside it. Raises UserError."""
    flags.expert = flags.expert or next(reversed(both))
    other = next(path for name, path in both.items() if name != flags.expert)
    if (other / "args.json").is_file():
        other = weights_of_run(other, flags.ema)[0]
    return replace(find_source(argparse.Namespace(**{**vars(flags), "source": both[flags.expert]})), other=other)


def newest_of_run(run: Path) -> tuple[Path, int]:
    """Return the folder of a run's newest weights, its own for the export of a finished run, and their steps.

    Raises:
        UserError: (MODEL) the run has saved nothing.
    """
    path = run / "run_status.json"
    status = read_json(path) if path.is_file() else {}
    exported = lora_file(run) is not None or any((run / name).is_dir() for name in EXPERTS.values())
    if exported and status.get("state") == "finished":
        return run, int(status.get("step") or 0)
    newest, _ = latest_checkpoint(run)
    if newest is not None:
        return newest, int(read_manifest(newest)["step"])
    if exported:
        return run, 0
    what = f"{run} has neither an export nor a checkpoint"
    raise UserError("source", what, "let the run save a checkpoint first", MODEL)


def weights_of_run(source: Path, ema: bool) -> tuple[Path, int]:
    """Return the folder of the weights in a run, a checkpoint or a folder of weights, and their optimizer steps.

    Args:
        source: a folder.
        ema: the EMA is wanted.

    Raises:
        UserError: (MODEL) there are none, or they are sharded or damaged.
    """
    folder, step = source, 0
    if (source / "args.json").is_file():
        folder, step = newest_of_run(source)
    if (folder / MANIFEST).is_file():
        if problems := verify(folder, hashes=False):
            raise UserError(str(folder), f"is damaged: {join_first(problems)}", "sample another checkpoint", MODEL)
        step = int(read_manifest(folder)["step"])
    if ema:
        places = [folder / exported_name(EMA_FOLDER, expert) for expert in EXPERTS]
        if (found := next((place for place in places if place.is_dir()), None)) is None:
            raise UserError("--ema", f"{folder} has no {EMA_FOLDER}", "remove the flag: the run kept no EMA", MODEL)
        return found, step
    if lora_file(folder) is not None:
        return folder, step
    if (full := find_full_weights(folder)) is not None:
        return full, step
    if tag_folder(folder, None) is not None or fsdp_folder(folder, None) is not None:
        hint = f"run scripts/zero_to_bf16.py {folder} FOLDER first, then sample FOLDER with --base"
        raise UserError("source", f"{folder} contains sharded weights", hint, MODEL)
    return folder, step
