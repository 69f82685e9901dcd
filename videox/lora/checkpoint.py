"""Serves who keeps a LoRA: adapters in files that diffusers and ComfyUI load, checkpoints without the frozen base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from videox.errors import MODEL, NUMERICS, UserError
from videox.files import publish_file, publish_folder, write_json_atomically
from videox.lora.adapters import Lora, initial_values, own_name, public_name
from videox.lora.layouts import lora_to_comfyui
from videox.lora.merge import low_rank, merged
from videox.lora.reader import PREFIX, STEM, read_lora
from videox.run.checkpoint import read_manifest
from videox.weights.format import TRANSFORMER
from videox.weights.layout_writer import MERGED
from videox.weights.layouts import family_of
from videox.weights.reader import open_tensors
from videox.weights.safetensors_io import (
    MAX_SHARD_SIZE,
    NamedTensors,
    StoredTensors,
    TensorSource,
    few,
    load_weights,
    save_tensors,
    sort_metadata,
    write_config,
)
from videox.weights.stream_writer import check_folder, write_folder

FACTS = "lora.json"  # beside the adapters in a checkpoint
SAMPLED = 64  # numbers at the beginning, in the middle and at the end of a tensor that tell a base from another

SaveLora = Callable[..., None]  # save_lora_weights of a diffusers pipeline


class LoraWeights:
    """See Kept: pytorch_lora_weights.safetensors as diffusers' pipeline writes it, float32, beside lora.json.

    Args:
        lora: what is trained.
        values: of the adapters to begin with, by their parameters' names.
        base: fingerprint of the frozen weights; needed on the main process alone.
        weights: where the frozen weights are.
        family: whose layouts the adapters have, as videox.weights.layouts calls it.
        save_lora_weights: of the family's pipeline.
    """

    trained_alone = True

    def __init__(
        self,
        lora: Lora,
        values: Mapping[str, Tensor],
        *,
        base: str,
        weights: Path,
        family: str,
        save_lora_weights: SaveLora,
    ) -> None:
        self.lora, self.values, self.base, self.weights, self.family = lora, values, base, weights, family
        self.save_lora_weights = save_lora_weights

    def save(self, checkpoint: Path, name: str, tensors: NamedTensors, config: str) -> None:
        """As Kept's; an average has a folder of its name."""
        del config
        found = dict(tensors.items() if isinstance(tensors, Mapping) else tensors)
        write_adapters(_place(checkpoint, name), found, self.lora, self.save_lora_weights)
        if name == TRANSFORMER:
            write_json_atomically(checkpoint / FACTS, {**asdict(self.lora), "base": self.base})

    def export(
        self,
        output_dir: Path,
        name: str,
        tensors: NamedTensors,
        config: str,
        *,
        dtype: torch.dtype,
        keep_fp32: Sequence[str],
        layouts: Sequence[str],
        metadata: Mapping[str, str],
    ) -> None:
        """Writes the trained adapters for use: diffusers' file, and what else is asked for.

        comfyui is pytorch_lora_weights_comfyui.safetensors beside it, merged a diffusers folder transformer_merged.

        Args:
            output_dir: of the run.
            name: as for save.
            tensors: as for save.
            config: of the base.
            dtype: of the tensors.
            keep_fp32: parts of names that stay float32 in a merged model.
            layouts: beside diffusers'.
            metadata: for the files' headers.

        Raises:
            UserError: (NUMERICS) a value is not finite in this dtype; (MODEL) the base is no longer there.
            SaveError: the disk refused; what stood there stands.
        """
        exact = dict(tensors.items() if isinstance(tensors, Mapping) else tensors)
        found = _cast(exact, dtype)
        place = _place(output_dir, name)
        place.mkdir(parents=True, exist_ok=True)
        metadata = {**metadata, "rank": str(self.lora.rank), "alpha": f"{self.lora.alpha:g}"}
        write = partial(
            write_adapters, tensors=found, lora=self.lora, save_lora_weights=self.save_lora_weights, metadata=metadata
        )
        publish_file(place / f"{STEM}.safetensors", write)
        for layout in layouts:
            told = {**metadata, "layout": layout}
            if layout == MERGED:
                self._merge(output_dir / f"{name}_{MERGED}", exact, config, dtype, keep_fp32, told)
                continue
            public = {public_name(key): tensor for key, tensor in found.items()}
            ratio = json.loads(config).get("mlp_ratio", 4.0)
            made = lora_to_comfyui(public, self.family, self.lora.alpha, mlp_ratio=ratio)
            stem = f"{STEM}_{layout}"
            save = partial(save_tensors, tensors=made, stem=stem, metadata=told)
            publish_file(place / f"{stem}.safetensors", save)

    def _merge(
        self, folder: Path, tensors: Mapping[str, Tensor], config: str, dtype: torch.dtype, keep_fp32: Sequence[str],
        metadata: Mapping[str, str],
    ) -> None:  # fmt: skip
        adapters = {public_name(name): tensor.detach().to("cpu") for name, tensor in tensors.items()}
        base = open_tensors(self.weights)
        plan = merged(base, low_rank(adapters, self.lora.scale), "diffusers", dtype, keep_fp32)

        def write(made: Path) -> None:
            write_folder(made, plan, max_shard_size=MAX_SHARD_SIZE, metadata=metadata)
            check_folder(made, plan)
            write_config(made, config)

        publish_folder(folder, write)

    def load(self, checkpoint: Path, model: nn.Module) -> None:
        """As Kept's."""
        trained = {f"{PREFIX}{public_name(n)}": p for n, p in model.named_parameters() if n in self.values}
        load_weights(checkpoint, trained, stem=STEM)

    def stored(self, checkpoint: Path, name: str) -> Mapping[str, Tensor]:
        """As Kept's."""
        found = StoredTensors(_place(checkpoint, name), STEM)
        return {own_name(key.removeprefix(PREFIX)): found[key] for key in found}


def _place(folder: Path, name: str) -> Path:
    return folder if name == TRANSFORMER else folder / name


# --------------------------------------------------------------------------------------------------------- writing


def write_adapters(
    folder: Path,
    tensors: Mapping[str, Tensor],
    lora: Lora,
    save_lora_weights: SaveLora,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes pytorch_lora_weights.safetensors, with rank and alpha in its header, from which diffusers reads them.

    Args:
        folder: made if absent; it must hold no such file.
        tensors: A and B by their parameters' names.
        lora: what they are.
        save_lora_weights: of the family's pipeline.
        metadata: for the header, beside what diffusers reads there.

    Raises:
        OSError, SafetensorError: the write failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{STEM}.safetensors"
    path.touch(exist_ok=False)
    mode = path.stat().st_mode  # of the user's umask; safetensors alone makes it 0600
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    save_lora_weights(
        folder,
        {public_name(name): tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()},
        weight_name=path.name,
        transformer_lora_adapter_metadata={**settings, "target_modules": sorted(lora.targets)},
    )
    if metadata:  # diffusers has no place for it
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
        save_file(load_file(path), path, metadata={**metadata, **said})
    sort_metadata(path)
    path.chmod(mode)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                name, f"has values that are not finite in {kind}", "export an earlier checkpoint", NUMERICS
            )
    return cast


# ----------------------------------------------------------------------------------------------- the base and resume


def fingerprint(stored: TensorSource) -> str:
    """Returns a hash of a few numbers of each of a base's weights, by diffusers' names: equal in all their layouts."""
    digest = hashlib.sha256()
    for name in sorted(stored):
        values = stored[name].reshape(-1)
        middle = len(values) // 2
        few_of_it = torch.cat([values[:SAMPLED], values[middle : middle + SAMPLED], values[-SAMPLED:]])
        digest.update(f"{name} {list(stored.shape(name))} ".encode())
        digest.update(few_of_it.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_facts(checkpoint: Path) -> dict[str, Any] | None:
    """Returns what lora.json says of a checkpoint's adapters, None where it holds whole weights. Raises UserError."""
    path = checkpoint / FACTS
    if FACTS not in read_manifest(checkpoint)["files"]:
        return None
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        what = f"cannot be read ({type(error).__name__}: {error})"
        raise UserError(str(path), what, "resume from another checkpoint", MODEL) from error


def refuse_other_kind(checkpoint: Path | None, rank: int) -> None:
    """Refuses a checkpoint of whole weights for a LoRA run, one of adapters for a full one, and one of another rank.

    Args:
        checkpoint: to resume from, None for a new run.
        rank: that was asked for, 0 = full fine-tuning.

    Raises:
        UserError: (MODEL) with both.
    """
    if checkpoint is None:
        return
    facts = read_facts(checkpoint)
    saved = facts["rank"] if facts else 0
    if saved != rank:
        kinds = {value: f"of rank {value}" if value else "of the whole model" for value in (saved, rank)}
        what = f"{checkpoint.name} is {kinds[saved]}, this run is {kinds[rank]}"
        hint = f"give --lora_rank {saved}, or begin a run in another --output_dir from these weights"
        raise UserError("--lora_rank", what, hint, MODEL)


def refuse_other_adapters(checkpoint: Path, lora: Lora, base: str) -> None:
    """Refuses adapters that another setting, or another base, gives another meaning.

    Args:
        checkpoint: to resume from.
        lora: of this launch.
        base: fingerprint of this launch's base.

    Raises:
        UserError: (MODEL) naming what changed.
    """
    facts = read_facts(checkpoint)
    if facts is None:
        return
    if facts.get("base") != base:
        what = f"{checkpoint.name} was trained on other frozen weights than these"
        hint = "give the base that the run began with (--pretrained_model_name_or_path, --transformer_path)"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)
    if facts.get("alpha") != lora.alpha:
        what = f"{lora.alpha:g}, {checkpoint.name} has {facts.get('alpha')}"
        raise UserError("--lora_alpha", what, "resume with the value that the run began with", MODEL)
    if differing := sorted({*facts.get("targets", ())} ^ {*lora.targets}):
        what = f"{few([f'{name} differs' for name in differing])} from {checkpoint.name}"
        raise UserError("--lora_target_modules", what, "resume with the layers that the run began with", MODEL)


# ------------------------------------------------------------------------------------------------------ beginning


def begin_adapters(
    lora: Lora,
    stored: TensorSource,
    pipeline_class: Any,  # noqa: ANN401 - of diffusers
    *,
    seed: int,
    resume: Path | None,
    other: Path | None,
    first: Callable[[Callable[[], object]], None],
) -> tuple[LoraWeights, list[str]]:
    """Returns what a LoRA run trains and keeps, and the lines that tell it; no weight is loaded.

    Args:
        lora: what is adapted.
        stored: the base's weights.
        pipeline_class: of the family, which knows its LoRA files.
        seed: of the run.
        resume: the checkpoint that will be loaded, None for a new run.
        other: a LoRA to begin with, None for a new one.
        first: runs a check on the main process; what that refuses, all refuse.

    Raises:
        UserError: the checkpoint was trained otherwise or on another base, or the other LoRA does not fit.
    """
    base: list[str] = []  # of the main process, the one that writes it

    def check() -> None:
        base.append(fingerprint(stored))
        if resume is not None:
            refuse_other_adapters(resume, lora, base[0])

    first(check)
    values, said = initial_values(lora, stored, seed), [lora.line(stored)]
    if other is not None and resume is None:
        values, line = begin_from(other, values, lora, pipeline_class.lora_state_dict)
        said.append(line)
    save, family = pipeline_class.save_lora_weights, family_of(stored) or ""
    return LoraWeights(
        lora, values, base="".join(base), weights=stored.folder, family=family, save_lora_weights=save
    ), said


def begin_from(
    path: Path,
    values: Mapping[str, Tensor],
    lora: Lora,
    load: Callable[..., tuple[dict[str, Tensor], dict[str, Any] | None]],
) -> tuple[dict[str, Tensor], str]:
    """Returns the values to begin with from a LoRA that was trained before, and a line that tells what was taken.

    Another alpha there is moved into B, so that the model begins as that LoRA left it. Layers that it does not adapt
    begin anew.

    Args:
        path: a .safetensors file in any layout that diffusers reads, or a folder with one, such as a checkpoint.
        values: initial_values.
        lora: of this run.
        load: lora_state_dict of the family's pipeline.

    Raises:
        UserError: (MODEL) it cannot be read, adapts other layers, or has another rank.
    """
    found, scale = read_lora(path, load, where="--init_lora_from")
    stored = {own_name(name): tensor for name, tensor in found.items()}
    stray = sorted(stored.keys() - values.keys())
    if stray or not stored:
        what = (
            f"{path} adapts {len(stray)} tensors that this run does not, first {stray[0]}"
            if stray
            else f"{path} holds no LoRA"
        )
        hint = "name its layers by --lora_target_modules"
        if not any(f".lora_{half}." in name for name in stored for half in "AB"):
            what, hint = f"{path} holds no LoRA", "give one; the weights of a whole model go to --transformer_path"
        raise UserError("--init_lora_from", what, hint, MODEL)
    begun = dict(values)
    for name, tensor in stored.items():
        if tensor.shape != values[name].shape:
            what = f"{path} has {list(tensor.shape)} in {name}, this run {list(values[name].shape)}"
            raise UserError("--init_lora_from", what, f"give --lora_rank {min(tensor.shape)}", MODEL)
        begun[name] = tensor.float() * (scale / lora.scale if ".lora_B." in name else 1.0)
    new = len(values) - len(stored)
    return begun, f"begins with the LoRA of {path}" + (f"; {new // 2} layers that it lacks begin anew" if new else "")
