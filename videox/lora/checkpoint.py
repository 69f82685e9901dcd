"""LoRA checkpoints and exports: adapter files for diffusers, ComfyUI and kohya's trainers, without the base model."""

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
from videox.files import mode_of_umask, publish_file, publish_folder, write_json_atomically
from videox.lora.adapters import Lora, initial_values, peft_name, public_name
from videox.lora.dora import dora_updates, initial_magnitudes
from videox.lora.header import STEPS, export_date, manager_fields
from videox.lora.initial import init_from_lora
from videox.lora.layouts import lora_to_comfyui, lora_to_kohya
from videox.lora.merge import lora_updates, merge_lora
from videox.lora.reader import PREFIX, STEM
from videox.run.checkpoint import read_manifest
from videox.weights.format import TRANSFORMER, ExportOptions
from videox.weights.layout_tables import KOHYA, MERGED
from videox.weights.layouts import family_of
from videox.weights.reader import open_tensors
from videox.weights.safetensors_io import (
    MAX_SHARD_SIZE,
    NamedTensors,
    StoredTensors,
    TensorSource,
    join_first,
    load_weights,
    save_tensors,
    sort_metadata,
    write_config,
)
from videox.weights.stream_writer import check_folder, write_folder

SETTINGS_FILE = "lora.json"  # in a checkpoint, next to the adapters
SAMPLED_VALUES = 64  # values at the beginning, in the middle and at the end of a tensor in a base model's fingerprint

SaveLora = Callable[..., None]  # save_lora_weights of a diffusers pipeline


class LoraWeights:
    """WeightFormat that stores the adapters: diffusers' pytorch_lora_weights.safetensors in float32, and lora.json.

    Args:
        lora: the adaptation that is trained.
        values: the adapters' initial values, by parameter name.
        base: fingerprint of the frozen weights; only needed on the main process.
        weights: path of the weights that the layout merged merges into; may be set later.
        family: the model family, as in videox.weights.layouts.
        save_lora_weights: the method of the family's diffusers pipeline.
    """

    trainable_only = True

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
        """See WeightFormat.save; EMA adapters have a folder of their own."""
        del config
        adapters = dict(tensors.items() if isinstance(tensors, Mapping) else tensors)
        write_adapters(_adapter_folder(checkpoint, name), adapters, self.lora, self.save_lora_weights)
        if name == TRANSFORMER:
            write_json_atomically(checkpoint / SETTINGS_FILE, {**asdict(self.lora), "base": self.base})

    def export(self, output_dir: Path, name: str, tensors: NamedTensors, config: str, options: ExportOptions) -> None:
        """See WeightFormat.export: the trained adapters in diffusers' file, and in each of the other layouts.

        The layouts comfyui and kohya are pytorch_lora_weights_comfyui.safetensors and ..._kohya.safetensors in the
        same folder. The layout merged is the base model with the adapters merged in, the diffusers folder
        transformer_merged.

        Raises:
            UserError: (NUMERICS) a value is not finite in this dtype; (MODEL) the base model no longer exists.
            SaveError: the disk refused; files that were there before are unchanged.
        """
        exact = dict(tensors.items() if isinstance(tensors, Mapping) else tensors)
        cast = _cast(exact, options.dtype)
        folder, own_stem = _adapter_folder(output_dir, name, options), options.stem(STEM)
        folder.mkdir(parents=True, exist_ok=True)
        own = {**options.metadata, "rank": str(self.lora.rank), "alpha": f"{self.lora.alpha:g}"}
        metadata = {**own, **self._manager_fields(folder, output_dir, options)}
        write = partial(
            write_adapters, tensors=cast, lora=self.lora, save_lora_weights=self.save_lora_weights, metadata=metadata,
            stem=own_stem,
        )  # fmt: skip
        publish_file(folder / f"{own_stem}.safetensors", write)
        for layout in options.layouts:
            header = {**(own if layout == MERGED else metadata), "layout": layout}
            if layout == MERGED:
                # From the exact adapters: the sum with the base model is rounded once.
                target = output_dir / f"{options.folder(name)}_{MERGED}"
                self._merge(target, exact, config, options.dtype, options.keep_fp32, header)
                continue
            public = {public_name(key): tensor for key, tensor in cast.items()}
            ratio = json.loads(config).get("mlp_ratio", 4.0)
            convert = lora_to_kohya if layout == KOHYA else lora_to_comfyui
            converted = convert(public, self.family, self.lora.alpha, mlp_ratio=ratio)
            stem = f"{own_stem}_{layout}"
            save = partial(save_tensors, tensors=converted, stem=stem, metadata=header)
            publish_file(folder / f"{stem}.safetensors", save)

    def _manager_fields(self, folder: Path, output_dir: Path, options: ExportOptions) -> dict[str, str]:
        """Return the fields for other programs. Files of a checkpoint do not depend on where the run's folder is."""
        facts: dict[str, object] = dict(options.metadata)
        if "checkpoint-" not in str(output_dir.resolve()):
            run = output_dir.resolve()  # of --expert both: a folder for each expert inside that of the command
            facts["output_name"] = f"{run.parent.name}_{run.name}" if run.name == options.expert else run.name
        date = export_date(folder / f"{options.stem(STEM)}.safetensors", options.metadata.get(STEPS))
        rank, alpha = self.lora.rank, self.lora.alpha
        return manager_fields(facts, self.family, rank=rank, alpha=alpha, date=date)

    def _merge(
        self, folder: Path, tensors: Mapping[str, Tensor], config: str, dtype: torch.dtype, keep_fp32: Sequence[str],
        metadata: Mapping[str, str],
    ) -> None:  # fmt: skip
        adapters = {public_name(name): tensor.detach().to("cpu") for name, tensor in tensors.items()}
        base = open_tensors(self.weights)
        scale = self.lora.scale
        updates = dora_updates(adapters, scale, base) if self.lora.dora else lora_updates(adapters, scale)
        plan = merge_lora(base, updates, "diffusers", dtype, keep_fp32)

        def write(temporary: Path) -> None:
            write_folder(temporary, plan, max_shard_size=MAX_SHARD_SIZE, metadata=metadata)
            check_folder(temporary, plan)
            write_config(temporary, config)

        publish_folder(folder, write)

    def load(self, checkpoint: Path, model: nn.Module) -> None:
        """See WeightFormat.load."""
        trainable = {f"{PREFIX}{public_name(n)}": p for n, p in model.named_parameters() if n in self.values}
        load_weights(checkpoint, trainable, stem=STEM)

    def stored(self, checkpoint: Path, name: str) -> Mapping[str, Tensor]:
        """See WeightFormat.stored."""
        tensors = StoredTensors(_adapter_folder(checkpoint, name), STEM)
        return {peft_name(key.removeprefix(PREFIX)): tensors[key] for key in tensors}


def _adapter_folder(folder: Path, name: str, options: ExportOptions | None = None) -> Path:
    """Return the folder of adapters; options: of an export, None for a checkpoint."""
    return folder if name == TRANSFORMER else folder / (options.folder(name) if options else name)


# --------------------------------------------------------------------------------------------------------- writing


def write_adapters(
    folder: Path,
    tensors: Mapping[str, Tensor],
    lora: Lora,
    save_lora_weights: SaveLora,
    metadata: Mapping[str, str] | None = None,
    stem: str = STEM,
) -> None:
    """Write pytorch_lora_weights.safetensors, with rank and alpha in its header, where diffusers reads them.

    Args:
        folder: created if it does not exist; it must not contain this file yet.
        tensors: A and B by their parameters' names.
        lora: the adaptation that they belong to.
        save_lora_weights: the method of the family's diffusers pipeline.
        metadata: further entries of the header.
        stem: another stem of the file.

    Raises:
        OSError, SafetensorError: the write failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.safetensors"
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    settings |= {"use_dora": True} if lora.dora else {}
    with mode_of_umask(path):
        save_lora_weights(
            folder,
            {public_name(name): tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()},
            weight_name=path.name,
            transformer_lora_adapter_metadata={**settings, "target_modules": sorted(lora.targets)},
        )
        if metadata:  # diffusers' function does not accept further entries: the file is written again
            with safe_open(path, framework="pt") as file:
                own_metadata = file.metadata()
            save_file(load_file(path), path, metadata={**metadata, **own_metadata})
        sort_metadata(path)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                name, f"has values that are not finite in {kind}", "export an earlier checkpoint", NUMERICS
            )
    return cast


# ----------------------------------------------------------------------------------------------- base model, resume


def fingerprint(stored: TensorSource) -> str:
    """Return a hash of a few values of each of a base model's weights, by diffusers' names: equal in all layouts."""
    digest = hashlib.sha256()
    for name in sorted(stored):
        values = stored[name].reshape(-1)
        middle = len(values) // 2
        sampled = (values[:SAMPLED_VALUES], values[middle : middle + SAMPLED_VALUES], values[-SAMPLED_VALUES:])
        digest.update(f"{name} {list(stored.shape(name))} ".encode())
        digest.update(torch.cat(sampled).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_settings(checkpoint: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint's lora.json, None if it stores all weights instead. Raises UserError."""
    path = checkpoint / SETTINGS_FILE
    if SETTINGS_FILE not in read_manifest(checkpoint)["files"]:
        return None
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        what = f"cannot be read ({type(error).__name__}: {error})"
        raise UserError(str(path), what, "resume from another checkpoint", MODEL) from error


def check_checkpoint_kind(checkpoint: Path | None, rank: int) -> None:
    """Check that a checkpoint fits the run: full weights for full fine-tuning, adapters of the same rank for LoRA.

    Args:
        checkpoint: the checkpoint to resume from, None for a new run.
        rank: value of --lora_rank, 0 = full fine-tuning.

    Raises:
        UserError: (MODEL) naming both kinds.
    """
    if checkpoint is None:
        return
    settings = read_settings(checkpoint)
    saved = settings["rank"] if settings else 0
    if saved != rank:
        kinds = {value: f"a LoRA of rank {value}" if value else "full fine-tuning" for value in (saved, rank)}
        what = f"{checkpoint.name} is from {kinds[saved]}, this run is {kinds[rank]}"
        hint = f"pass --lora_rank {saved}" if saved else "leave out --lora_rank"
        raise UserError("--lora_rank", what, f"{hint}, or start a new run in another --output_dir", MODEL)


def check_same_adapters(checkpoint: Path, lora: Lora, base: str) -> None:
    """Check that a checkpoint's adapters have this run's base model, alpha and target layers.

    Args:
        checkpoint: the checkpoint to resume from.
        lora: the adaptation of this run.
        base: fingerprint of this run's base model.

    Raises:
        UserError: (MODEL) naming what changed.
    """
    settings = read_settings(checkpoint)
    if settings is None:
        return
    if settings.get("base") != base:
        what = f"{checkpoint.name} was trained on another base model"
        hint = "pass the base model that the run started with (--pretrained_model_name_or_path, --transformer_path)"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)
    if settings.get("alpha") != lora.alpha:
        what = f"{lora.alpha:g}, {checkpoint.name} has {settings.get('alpha')}"
        raise UserError("--lora_alpha", what, "resume with the value that the run started with", MODEL)
    if settings.get("dora", False) is not lora.dora:
        kinds = ("lora", "dora") if lora.dora else ("dora", "lora")
        what = f"{kinds[1]}, {checkpoint.name} is a {kinds[0]}"
        raise UserError("--lora_type", what, f"pass --lora_type {kinds[0]}, or start a new run", MODEL)
    if (ratio := settings.get("loraplus_ratio", 1.0)) != lora.loraplus_ratio:
        what = f"{lora.loraplus_ratio:g}, {checkpoint.name} has {ratio:g}"
        raise UserError("--loraplus_ratio", what, "resume with the value that the run started with", MODEL)
    if differing := sorted({*settings.get("targets", ())} ^ {*lora.targets}):
        what = f"{join_first([f'{name} differs' for name in differing])} from {checkpoint.name}"
        raise UserError("--lora_target_modules", what, "resume with the layers that the run started with", MODEL)


# --------------------------------------------------------------------------------------------------- initialization


def prepare_lora(
    lora: Lora,
    stored: TensorSource,
    pipeline_class: Any,  # noqa: ANN401 - of diffusers
    *,
    seed: int,
    resume: Path | None,
    init_from: Path | None,
    run_on_main: Callable[[Callable[[], object]], None],
    expert: str | None = None,
) -> tuple[LoraWeights, list[str]]:
    """Return the weight format of a LoRA run with its initial adapters, and the lines to print; no weight is loaded.

    Args:
        lora: the adaptation.
        stored: the base model's weights.
        pipeline_class: the family's diffusers pipeline, which reads and writes its LoRA files.
        seed: the run's seed.
        resume: the checkpoint that will be loaded, None for a new run.
        init_from: a LoRA to start from, None for new adapters.
        run_on_main: runs a check on the main process; if it raises UserError, all processes raise it.
        expert: that is trained, of a model of two.

    Raises:
        UserError: the checkpoint has other settings or another base model, or the LoRA to start from does not fit.
    """
    base: list[str] = []  # the fingerprint on the main process, which writes it to checkpoints; empty on the others

    def check() -> None:
        base.append(fingerprint(stored))
        if resume is not None:
            check_same_adapters(resume, lora, base[0])

    run_on_main(check)
    values, lines = initial_values(lora, stored, seed), [lora.summary(stored)]
    family = family_of(stored) or ""
    if init_from is not None and resume is None:
        values, note = init_from_lora(
            init_from, values, lora, pipeline_class.lora_state_dict, stored=stored, family=family, expert=expert
        )
        lines += note
    if lora.dora:
        values |= initial_magnitudes(lora, stored, values, resumed=resume is not None)
    save = pipeline_class.save_lora_weights
    return LoraWeights(
        lora, values, base="".join(base), weights=stored.folder, family=family, save_lora_weights=save
    ), lines
