"""Serves whoever takes a transformer from one program to another: from any layout to any, a block at a time.

    python scripts/export.py outputs/wan/checkpoint-500 wan.safetensors --layout comfyui --dtype bf16
    python scripts/export.py outputs/wan/transformer    wan.safetensors --layout original
    python scripts/export.py wan2.1_t2v_14B_bf16.safetensors a_new_folder --layout diffusers
    python scripts/export.py outputs/lora/checkpoint-500 lora.safetensors --layout comfyui
    python scripts/export.py outputs/lora/checkpoint-500 merged --layout diffusers --base models/Wan2.1-T2V-14B

It reads a run's checkpoint-N or transformer folder, a transformer folder of diffusers, Wan's original folder, and
single files (.safetensors, .pt, .pth), bf16, fp16, float32 or 8-bit with scales. `diffusers` makes a folder that
from_pretrained loads, `original` one file with the published names, `comfyui` the same for ComfyUI's folder
diffusion_models. A LoRA (a checkpoint, its folder or a file) becomes one file for diffusers or ComfyUI, or by --base
one model with it: W + alpha / rank B A in float32, rounded once, a block at a time.

What is there is never overwritten, the result is whole or absent, and nothing that lies in a file is run. A checkpoint
in shards goes through scripts/zero_to_bf16.py first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from tqdm import tqdm
from zero_to_bf16 import published, readable, refuse_full_disk, refuse_place, shard_size, whole_weights

from videox.errors import FLAGS, MODEL, NUMERICS, STORAGE, UNLOADABLE, UserError
from videox.files import SaveError, publish_file
from videox.lora.checkpoint import FACTS, fingerprint
from videox.lora.layouts import lora_to_comfyui
from videox.lora.merge import low_rank, merged
from videox.lora.reader import PREFIX, lora_family, lora_file, read_lora
from videox.models.component import Component, find_part, refuse_misfit
from videox.models.folder import read_json
from videox.models.hub import local_folder
from videox.run.checkpoint import MANIFEST, verify
from videox.run.lifecycle import run_script
from videox.training.args import EXPORT_DTYPES
from videox.training.argument_parser import Parser
from videox.weights.deepspeed_reader import tag_folder
from videox.weights.fsdp_reader import fsdp_folder
from videox.weights.header import MODEL_CONFIG, OF_THE_FILE, TRAINER, describe, header_of, json_object, stored_config
from videox.weights.layout_writer import ARCHITECTURES, LAYOUTS, write_file
from videox.weights.layouts import family_of
from videox.weights.reader import LayoutTensors, open_tensors
from videox.weights.safetensors_io import CONFIG, few, save_tensors
from videox.weights.stream_writer import Planned, check_bytes, check_folder, write_folder

CLASSES = {"wan": "WanTransformer3DModel", "hunyuan": "HunyuanVideoTransformer3DModel"}
PUBLISHED = {"wan": "WanModel"}  # what an original config.json calls the same
LORA = "lora"
PIPELINES = {"wan": "WanPipeline", "hunyuan": "HunyuanVideoPipeline"}


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder or file of weights")
    parser.add_argument(
        "output", type=Path, help="a new folder for a model in diffusers' layout, else a new .safetensors file"
    )
    parser.add_argument("--layout", required=True, choices=("diffusers", *LAYOUTS), help="to write")
    parser.add_argument(
        "--dtype",
        choices=tuple(EXPORT_DTYPES),
        help="of the floating tensors; diffusers keeps some in float32 (default: as stored; 8-bit becomes bf16)",
    )
    parser.add_argument(
        "--config", type=Path, help="config.json that goes with a single file (default: the one beside it, if any)"
    )
    parser.add_argument(
        "--base", help="of a LoRA: model folder, transformer folder, file or hub id to write it into (none = the LoRA)"
    )
    parser.add_argument(
        "--max_shard_size", type=shard_size, default="10GB", help="bytes per file of a diffusers folder (default 10GB)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="also compare every byte written with what is read back (default: no)"
    )
    return parser.parse(argv)


def source_path(source: Path, where: str = "source") -> Path:
    """Returns the folder or file with the transformer's weights; where: what the user gave, for the refusal.

    Raises:
        UserError: (MODEL) a checkpoint is damaged or holds shards alone, or nothing is there.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(where, f"{source} is not there", "name a checkpoint-N, a transformer folder or a file", MODEL)
    if (source / MANIFEST).is_file() and (problems := verify(source, hashes=False)):
        raise UserError(str(source), f"is damaged: {few(problems)}", "export another checkpoint", MODEL)
    if (folder := whole_weights(source)) is not None:
        return folder
    if tag_folder(source, None) is not None or fsdp_folder(source, None) is not None:
        what = f"{source} holds its weights in the shards of several processes"
        raise UserError(where, what, f"run scripts/zero_to_bf16.py {source} FOLDER first, then export FOLDER", MODEL)
    return source


def find_transformer(path: Path, config: Path | None) -> Component:
    """Returns the transformer that the weights are, with its configuration. Raises UserError (MODEL)."""
    tensors = open_tensors(path)
    family = tensors.layout or family_of(tensors)
    if family not in CLASSES:
        what = f"holds {family or 'tensors of no known kind'}, no transformer of {' or '.join(ARCHITECTURES.values())}"
        raise UserError(str(path), what, "give the weights of a transformer", MODEL)
    part = find_part(path, family, config_for(path, family, config))
    return Component(part.path, part.config, tensors)  # those of a diffusers folder, too


def config_for(path: Path, family: str, config: Path | None) -> dict[str, Any]:
    """Returns the configuration that goes with weights: the one given, the one in a file's header, or one beside it.

    Raises:
        UserError: (MODEL) it cannot be read, or is of another class than the weights.
    """
    known, beside, classes = stored_config(path), path.parent / CONFIG, (CLASSES[family], PUBLISHED.get(family), None)
    if config is not None:
        known = read_json(config)
    elif not known and path.is_file() and beside.is_file():
        found = read_json(beside)
        known = found if found.get("_class_name") in classes else {}  # of something else that lies there
    if known.get("_class_name") not in classes:
        where, what = ("--config", str(config)) if config else (str(path), "its header")
        what += f" describes a {known['_class_name']}, the weights are of a {CLASSES[family]}"
        raise UserError(where, what, "give the config.json that goes with the weights", MODEL)
    return known


def model_of(part: Component) -> Any:  # noqa: ANN401 - of diffusers
    """Returns the model that a configuration describes, without its memory, after its tensors have been compared."""
    import diffusers  # seconds; a flag that is wrong is told before

    assert part.tensors is not None
    model_class = getattr(diffusers, CLASSES[part.tensors.layout or str(family_of(part.tensors))])
    try:
        with init_empty_weights():
            model = model_class.from_config(part.config)
    except UNLOADABLE as why:
        raise UserError(
            str(part.path), f"its configuration makes no model ({why})", "give --config FILE", MODEL
        ) from why
    refuse_misfit(part.tensors, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    return model


def refuse_output(source: Path, output: Path, layout: str) -> None:
    """Raises UserError if the output is taken, lies in the source or a checkpoint, or has a name of the other kind.

    Args:
        layout: of a model; of a LoRA, which is one file in each, any but diffusers.
    """
    if layout == "diffusers":
        if output.suffix == ".safetensors":
            raise UserError("output", f"{output} is a file's name, this layout is a folder", "name a folder", FLAGS)
        refuse_place(source, output, "output")
        return
    if output.suffix != ".safetensors":
        raise UserError("output", f"{output} is no name of a .safetensors file", "name one", FLAGS)
    inside = [folder for folder in output.resolve().parents if (folder / MANIFEST).is_file()]
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        inside.append(source)
    if inside:
        raise UserError("output", f"{output} lies in {inside[0]}", "name a file outside of it", FLAGS)
    if os.path.lexists(output):
        raise UserError("output", f"{output} exists", "name a new file, or remove it", FLAGS)


def known_of(source: Path) -> dict[str, str]:
    """Returns what is known of weights: base_model, task, rank, alpha, steps, seed, sizes, shift, trainer.

    Args:
        source: a file, a transformer's folder, or a checkpoint; what lies in a checkpoint is told by its own records.
    """
    header = header_of(source)
    found = {}
    if header.get("trainer", "").startswith(TRAINER):
        found = {k: v for k, v in header.items() if k not in OF_THE_FILE and not k.startswith("modelspec.")}
    folders = (source, *source.resolve().parents[:2])
    checkpoint = next((folder for folder in folders if (folder / MANIFEST).is_file()), None)
    adapters = json_object(header.get("lora_adapter_metadata", "{}"))
    said = {"rank": adapters.get("transformer.r"), "alpha": adapters.get("transformer.lora_alpha")}
    if checkpoint is not None:
        manifest, state, lora = (
            json_file(checkpoint / name) for name in (MANIFEST, "trainer_state.json", "lora.json")
        )
        said |= manifest.get("description") or {}
        said |= {"steps": manifest.get("step"), "seed": state.get("seed")}
        if lora:
            said |= {"rank": lora.get("rank"), "alpha": lora.get("alpha")}
        if version := (manifest.get("versions") or {}).get("videox"):
            said["trainer"] = f"{TRAINER}{version}"
    return {**found, **{name: str(value) for name, value in said.items() if value is not None}}


def json_file(path: Path) -> dict[str, Any]:
    return json_object(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}


def headed(source: Path, facts: dict[str, str | None], base: str | None = None) -> dict[str, str]:
    """Returns a file's header: what is known of the source, and facts of the file itself.

    Args:
        base: that a LoRA is written into, as the user named it.
    """
    known = known_of(source)
    base_model = base or known.pop("base_model", None)
    # weights that nobody here has trained have a name and no more
    title = None if base_model else f"{source.parent.name if lora_file(source) else source.stem}"
    return describe(base_model, {**known, **facts}, title=title)


def dtype_name(tensors: Iterable[Tensor]) -> str:
    """Returns how --dtype calls the dtype of most numbers."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.numel()
    found = sizes.most_common(1)[0][0]
    return next((name for name, dtype in EXPORT_DTYPES.items() if dtype == found), str(found))


# --------------------------------------------------------------------------------------------------------- a LoRA


def adapters_of(path: Path, family: str) -> tuple[dict[str, Tensor], float]:
    """Returns a LoRA's adapters by diffusers' names, and alpha / rank. Raises UserError (MODEL)."""
    import diffusers

    checkpoint = path.parent
    if (checkpoint / MANIFEST).is_file() and (problems := verify(checkpoint, hashes=False)):
        raise UserError(str(checkpoint), f"is damaged: {few(problems)}", "export another checkpoint", MODEL)
    return read_lora(path, getattr(diffusers, PIPELINES[family]).lora_state_dict, where="source")


def export_lora(path: Path, output: Path, layout: str, dtype: torch.dtype | None, config: Path | None) -> int:
    """Writes a LoRA as one file of diffusers or ComfyUI; returns its bytes. Raises UserError."""
    if layout == "original":
        raise UserError("--layout", "a LoRA has no layout called original", "give comfyui, which has its names", FLAGS)
    family = lora_family(path)
    adapters, scale = adapters_of(path, family)
    ranks = {name.split(".lora_")[0]: len(adapters[name]) for name in adapters if ".lora_A." in name}
    low_rank(adapters, scale)  # refuses what is no pair of halves
    if layout == "comfyui":
        known = read_json(config) if config else {}
        alphas = {name: scale * rank for name, rank in ranks.items()}
        made = lora_to_comfyui(adapters, family, alphas, mlp_ratio=known.get("mlp_ratio", 4.0))
    else:
        # B alone takes the scale, so that a loader needs no word of alpha
        made = {
            f"{PREFIX}{name}": (scale * t.float()).to(t.dtype) if ".lora_B." in name else t
            for name, t in adapters.items()
        }
    made = {name: t if name.endswith(".alpha") else t.to(dtype or t.dtype).contiguous() for name, t in made.items()}
    if bad := [name for name, tensor in made.items() if not tensor.isfinite().all()]:
        raise UserError(str(path), f"{few(bad)}: not finite in this dtype", "give another --dtype", NUMERICS)
    said = {"architecture": f"{ARCHITECTURES[family]}/lora", "layout": layout, "dtype": dtype_name(made.values())}
    if len(set(ranks.values())) == 1:  # alpha: that goes with these tensors
        rank = next(iter(ranks.values()))
        said |= {"rank": f"{rank}", "alpha": f"{rank * scale if layout == 'comfyui' else rank:g}"}
    metadata = headed(path, said)
    with written(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        publish_file(output, lambda folder: save_tensors(folder, made, stem=output.stem, metadata=metadata))
    return output.stat().st_size


def note_other_base(path: Path, base: LayoutTensors) -> None:
    """Says so where a checkpoint's adapters were trained on other weights than these: a choice, or a mistake."""
    facts = path.parent / FACTS
    if facts.is_file() and read_json(facts).get("base") != fingerprint(base):
        print(f"note: {path} was trained on other weights, or on these in another dtype, than {base.path}")


# ------------------------------------------------------------------------------------------------------ the whole


@contextmanager
def written(output: Path) -> Iterator[None]:
    """Has a write that the disk refuses say what to do. Raises UserError (STORAGE)."""
    try:
        yield
    except (OSError, SaveError) as why:
        cause = why.__context__ if isinstance(why, SaveError) and why.__context__ else why
        reason = getattr(cause, "strerror", None) or cause
        hint = "name a place that you can write, with room"
        raise UserError("output", f"{output} cannot be written ({reason})", hint, STORAGE) from why


def export_model(tensors: list[Planned], config: str, metadata: dict[str, str], flags: argparse.Namespace) -> int:
    """Writes a model in the layout that was asked for; returns its bytes. config: of the model, as JSON."""
    size = sum(tensor.nbytes for tensor in tensors)
    output = flags.output.resolve()
    refuse_full_disk(output, size, "output")
    with tqdm(total=size * (1 + flags.verify), unit="B", unit_scale=True, desc="exporting", disable=None) as bar:
        if flags.layout != "diffusers":
            with written(output):
                output.parent.mkdir(parents=True, exist_ok=True)
                write_file(output, tensors, metadata, verify=flags.verify, told=bar.update)
            return size
        with written(output), published(output) as folder:
            checksums = write_folder(
                folder, tensors, max_shard_size=flags.max_shard_size, with_checksums=flags.verify, told=bar.update,
                metadata=metadata,
            )  # fmt: skip
            (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
            check_folder(folder, tensors)
            if flags.verify:
                check_bytes(folder, checksums, bar.update)
    return size


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    lora, dtype = lora_file(flags.source), EXPORT_DTYPES[flags.dtype] if flags.dtype else None
    if flags.base and lora is None:
        raise UserError("--base", f"{flags.source} is no LoRA", "leave --base out, or give a LoRA", FLAGS)
    if flags.config is not None and not flags.config.is_file():
        raise UserError("--config", f"{flags.config} is no file", "name a config.json", MODEL)
    alone = lora is not None and not flags.base
    refuse_output(flags.source, flags.output, LORA if alone else flags.layout)
    if lora is not None and alone:
        size = export_lora(lora, flags.output, flags.layout, dtype, flags.config)
        print(
            f"{flags.output}: {readable(size)}, a LoRA that {flags.layout} loads; --base MODEL writes it into a model"
        )
        return 0
    source = source_path(local_folder(flags.base, "--base"), "--base") if flags.base else source_path(flags.source)
    part = find_transformer(source, flags.config)
    assert part.tensors is not None
    model, family = model_of(part), part.tensors.layout or str(family_of(part.tensors))
    kept = type(model)._keep_in_fp32_modules or () if flags.layout == "diffusers" else ()
    changes = {}
    if lora is not None:
        note_other_base(lora, part.tensors)
        changes = low_rank(*adapters_of(lora, family))
    tensors = merged(part.tensors, changes, flags.layout, dtype, kept)
    told = {"architecture": ARCHITECTURES[family], "layout": flags.layout, "lora": lora and lora.parent.name}
    told["dtype"] = flags.dtype
    print(f"{part.path}: {part.tensors.layout or 'diffusers'} names, {len(part.tensors)} tensors")
    if changes:
        print(f"{lora}: {len(changes)} layers adapted")
    config = json.loads(model.to_json_string())
    if flags.layout != "diffusers":
        told[MODEL_CONFIG] = json.dumps({k: v for k, v in config.items() if k != "_name_or_path"}, sort_keys=True)
    metadata = headed(lora or flags.source, told, flags.base)
    size = export_model(tensors, json.dumps(config, indent=2, sort_keys=True), metadata, flags)
    use = {
        "diffusers": f"load it with {type(model).__name__}.from_pretrained, or train on by --transformer_path",
        "original": "it has the published names; train on by --transformer_path",
        "comfyui": "put it into ComfyUI's folder models/diffusion_models",
    }
    print(f"{flags.output.resolve()}: {readable(size)}, checked; {use[flags.layout]}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is half written is then removed
    run_script(main)
