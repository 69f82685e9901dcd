"""Converts a transformer or a LoRA between diffusers, the original layout and ComfyUI, one block at a time.

    python scripts/export.py outputs/wan/checkpoint-500 wan.safetensors --layout comfyui --dtype bf16
    python scripts/export.py outputs/wan/transformer    wan.safetensors --layout original
    python scripts/export.py wan2.1_t2v_14B_bf16.safetensors a_new_folder --layout diffusers
    python scripts/export.py outputs/lora/checkpoint-500 lora.safetensors --layout comfyui
    python scripts/export.py outputs/lora/checkpoint-500 merged --layout diffusers --base $MODEL_NAME
    python scripts/export.py outputs/wan/checkpoint-500 lora.safetensors --layout comfyui --extract_lora 64 $MODEL_NAME

It reads a run's checkpoint-N or transformer folder, a diffusers transformer folder, Wan's original folder, and single
files (.safetensors, .pt, .pth) in bf16, fp16, float32 or 8-bit with scales. `diffusers` writes a folder that
from_pretrained loads, `original` one file with the published names, `comfyui` one file for ComfyUI's folder
diffusion_models. A LoRA (a checkpoint, its folder or a file of any trainer) is written as one file for diffusers,
ComfyUI or kohya's trainers; with --base it is merged into the base model: W + alpha / rank B A in float32, rounded
once. --extract_lora makes a LoRA from a model and its base, by the singular value decomposition of their difference.

Existing files are never overwritten, the output appears atomically, and no code in a file is run. Convert a sharded
checkpoint with scripts/zero_to_bf16.py first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from tqdm import tqdm
from zero_to_bf16 import (
    atomic_folder,
    check_disk_space,
    check_output_folder,
    find_full_weights,
    format_bytes,
    shard_size,
)

from videox.errors import FLAGS, LOAD_ERRORS, MODEL, STORAGE, SaveError, UserError, plural
from videox.lora.checkpoint import SETTINGS_FILE, fingerprint
from videox.lora.convert import cast, to_layout, write_lora
from videox.lora.extract import Extraction, extract_lora
from videox.lora.facts import make_metadata
from videox.lora.merge import lora_updates, merge_lora
from videox.lora.reader import STEM, lora_family, lora_file, read_lora
from videox.models.component import check_shapes, find_component
from videox.models.config_files import read_json
from videox.models.configured import Component
from videox.models.hub import local_folder
from videox.run.checkpoint import MANIFEST, verify
from videox.run.lifecycle import run_script
from videox.training.argument_parser import Parser
from videox.weights.deepspeed_reader import tag_folder
from videox.weights.expert_names import EXPERTS, both_experts
from videox.weights.format import EXPORT_DTYPES
from videox.weights.fsdp_reader import fsdp_folder
from videox.weights.header import MODEL_CONFIG, header_config, read_metadata
from videox.weights.layout_tables import KOHYA, LAYOUTS
from videox.weights.layout_writer import ARCHITECTURES, write_file
from videox.weights.layouts import family_of
from videox.weights.reader import LayoutTensors, open_tensors
from videox.weights.safetensors_io import CONFIG, join_first
from videox.weights.stream_writer import TensorToWrite, check_bytes, check_folder, write_folder

CLASSES = {"wan": "WanTransformer3DModel", "hunyuan": "HunyuanVideoTransformer3DModel"}
PUBLISHED = {"wan": "WanModel"}  # class name in an original config.json
LORA = "lora"
MAX_RANK = 4096
PIPELINES = {"wan": "WanPipeline", "hunyuan": "HunyuanVideoPipeline"}


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder or file of weights")
    parser.add_argument(
        "output", type=Path, help="a new folder for --layout diffusers (models), otherwise a new .safetensors file"
    )
    parser.add_argument("--layout", required=True, choices=("diffusers", *LAYOUTS, KOHYA), help="layout of the output")
    parser.add_argument(
        "--dtype",
        choices=tuple(EXPORT_DTYPES),
        help="dtype of the floating-point tensors; the diffusers layout keeps some in float32 (default: the stored dtype; "
        "8-bit becomes bf16)",
    )
    parser.add_argument(
        "--config", type=Path, help="config.json for a single file (default: the one in the same folder, if any)"
    )
    parser.add_argument(
        "--base",
        help="base model to merge a LoRA into: model folder, transformer folder, file or Hub id (default: write the LoRA)",
    )
    parser.add_argument(
        "--extract_lora",
        nargs=2,
        metavar=("RANK", "BASE"),
        help="write a LoRA of this rank that turns the model BASE (as for --base) into the source, nearly",
    )
    parser.add_argument(
        "--max_shard_size",
        type=shard_size,
        default="10GB",
        help="maximum file size in a diffusers folder (default: 10GB)",
    )
    expert = "of a folder with both experts of Wan2.2, the one to read (default: as the header of a LoRA says)"
    parser.add_argument("--expert", choices=tuple(EXPERTS), help=expert)
    parser.add_argument("--verify", action="store_true", help="read back every byte written and compare checksums")
    return parser.parse(argv)


def find_weights(source: Path, where: str = "source", expert: str | None = None) -> Path:
    """Find the folder or file with the transformer's weights.

    Args:
        source: a checkpoint, a transformer folder or a file.
        where: name of the command-line argument, for the message.
        expert: of Wan2.2, to choose from a folder with both.

    Raises:
        UserError: (MODEL) the path does not exist, or a checkpoint is damaged or contains only shards; (FLAGS) it has
            both experts, and none is chosen.
    """
    if source.is_file():
        return source
    source = one_expert(source, expert)
    if not source.is_dir():
        raise UserError(
            where, f"{source} does not exist", "pass a checkpoint-N, a transformer folder or a file", MODEL
        )
    if (source / MANIFEST).is_file() and (problems := verify(source, hashes=False)):
        raise UserError(str(source), f"is damaged: {join_first(problems)}", "export another checkpoint", MODEL)
    if (folder := find_full_weights(source)) is not None:
        return folder
    if tag_folder(source, None) is not None or fsdp_folder(source, None) is not None:
        what = f"{source} contains sharded weights"
        raise UserError(where, what, f"run scripts/zero_to_bf16.py {source} FOLDER first, then export FOLDER", MODEL)
    return source


def one_expert(source: Path, expert: str | None) -> Path:
    """Return the place of an expert in a folder with both; any other path unchanged. Raises UserError (FLAGS)."""
    both = both_experts(source, STEM)
    if both and expert is None:
        what = f"{source} has both experts of Wan2.2"
        raise UserError("--expert", what, f"pass --expert {' or --expert '.join(both)}", FLAGS)
    return both[str(expert)] if both else source


def find_transformer(path: Path, config: Path | None) -> Component:
    """Open the weights of a transformer together with its configuration. Raises UserError (MODEL)."""
    tensors = open_tensors(path)
    family = tensors.layout or family_of(tensors)
    if family not in CLASSES:
        what = f"contains {family or 'unknown tensors'}, not a {' or '.join(ARCHITECTURES.values())} transformer"
        raise UserError(str(path), what, "pass the weights of a transformer", MODEL)
    component = find_component(path, family, find_config(path, family, config))
    return Component(
        component.path, component.config, tensors
    )  # find_component leaves out the tensors of a diffusers folder


def find_config(path: Path, family: str, config: Path | None) -> dict[str, Any]:
    """Find the configuration of the weights: from --config, the file's header, or config.json in the same folder.

    Args:
        path: folder or file of the weights.
        family: "wan" | "hunyuan".
        config: value of --config, or None.

    Raises:
        UserError: (MODEL) it cannot be read, or describes another class than that of the weights.
    """
    known, sibling, classes = header_config(path), path.parent / CONFIG, (CLASSES[family], PUBLISHED.get(family), None)
    if config is not None:
        known = read_json(config)
    elif not known and path.is_file() and sibling.is_file():
        found = read_json(sibling)
        known = found if found.get("_class_name") in classes else {}  # else it belongs to another model in the folder
    if known.get("_class_name") not in classes:
        where, what = ("--config", str(config)) if config else (str(path), "its header")
        what += f" describes a {known['_class_name']}, the weights are of a {CLASSES[family]}"
        raise UserError(where, what, "pass the config.json of the weights", MODEL)
    return known


def build_model(component: Component) -> Any:  # noqa: ANN401 - a diffusers class
    """Build the model that a configuration describes, on the meta device, and compare its shapes with the tensors."""
    import diffusers  # imported here: it takes seconds, and wrong flags are reported before

    assert component.tensors is not None
    model_class = getattr(diffusers, CLASSES[component.tensors.layout or str(family_of(component.tensors))])
    try:
        with init_empty_weights():
            model = model_class.from_config(component.config)
    except LOAD_ERRORS as why:
        what = f"does not build a model from its configuration ({why})"
        raise UserError(str(component.path), what, "pass --config FILE", MODEL) from why
    check_shapes(component.tensors, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    return model


def check_output(source: Path, output: Path, layout: str) -> None:
    """Raise UserError if the output exists, is inside the source or a checkpoint, or has the wrong suffix.

    Args:
        source: the weights to export.
        output: the file or folder to create.
        layout: layout of a model; LORA for a LoRA, which is one file in every layout.
    """
    if layout == "diffusers":
        if output.suffix == ".safetensors":
            raise UserError(
                "output", f"{output} is the name of a file, but this layout is a folder", "pass a folder", FLAGS
            )
        check_output_folder(source, output, "output")
        return
    if output.suffix != ".safetensors":
        raise UserError(
            "output", f"{output} is not the name of a .safetensors file", "pass a name with this suffix", FLAGS
        )
    inside = [folder for folder in output.resolve().parents if (folder / MANIFEST).is_file()]
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        inside.append(source)
    if inside:
        raise UserError("output", f"{output} is inside {inside[0]}", "pass a file outside of it", FLAGS)
    if os.path.lexists(output):
        raise UserError("output", f"{output} exists", "pass a new file, or remove it", FLAGS)


# ---------------------------------------------------------------------------------------------------------- LoRA


def load_adapters(path: Path, family: str) -> tuple[dict[str, Tensor], float]:
    """Read a LoRA's adapters by their diffusers names, and alpha / rank. Raises UserError (MODEL)."""
    import diffusers

    checkpoint = path.parent
    if (checkpoint / MANIFEST).is_file() and (problems := verify(checkpoint, hashes=False)):
        raise UserError(str(checkpoint), f"is damaged: {join_first(problems)}", "export another checkpoint", MODEL)
    return read_lora(path, getattr(diffusers, PIPELINES[family]).lora_state_dict, where="source")


def export_lora(path: Path, flags: argparse.Namespace) -> None:
    """Write a LoRA as one file in the layout of --layout. Raises UserError."""
    family, config = lora_family(path), read_json(flags.config) if flags.config else {}
    adapters, scale = load_adapters(path, family)
    lora_updates(adapters, scale)  # raises for an A without its B, or the reverse
    save_lora(path, adapters, scale, family, flags, mlp_ratio=config.get("mlp_ratio", 4.0))


def save_lora(
    source: Path,
    adapters: Mapping[str, Tensor],
    scale: float,
    family: str,
    flags: argparse.Namespace,
    *,
    mlp_ratio: float,
    base: str | None = None,
) -> None:
    """Write adapters by diffusers' names to the output, and print a line that describes the file."""
    ranks = {len(tensor) for name, tensor in adapters.items() if ".lora_A." in name}
    made = to_layout(adapters, scale, family, flags.layout, mlp_ratio=mlp_ratio)
    made = cast(made, EXPORT_DTYPES[flags.dtype] if flags.dtype else None)
    with explain_write_errors(flags.output):
        write_lora(
            source, flags.output, made, family, layout=flags.layout, scale=scale, ranks=ranks, base=base
        )  # fmt: skip
    size = format_bytes(flags.output.stat().st_size)
    print(f"{flags.output}: {size}, a LoRA for {flags.layout}; --base MODEL merges it into a model")


def extract(flags: argparse.Namespace) -> None:
    """Write the LoRA that is nearest to the difference of two models, and print its error. Raises UserError."""
    rank, base_name = int(flags.extract_lora[0]), flags.extract_lora[1]
    tuned = find_transformer(find_weights(flags.source), flags.config)
    expert = flags.expert or read_metadata(tuned.path).get("expert")
    base = find_transformer(find_weights(local_folder(base_name, "--extract_lora"), "--extract_lora", expert), None)
    assert tuned.tensors is not None and base.tensors is not None
    dtype = EXPORT_DTYPES[flags.dtype or "fp32"]
    with tqdm(total=len(tuned.tensors), unit="tensor", desc="extracting", disable=None) as bar:
        found = extract_lora(tuned.tensors, base.tensors, rank, dtype, bar.update)
    print(f"{len(found.errors)} linear layers differ; error of rank {rank}: {describe_error(found)}")
    if found.left_out:
        share = f"{100 * found.left_out_share:.3g} % of the squared difference"
        print(
            f"note: not in the LoRA: {len(found.left_out)} other {plural(len(found.left_out), 'tensor that differs', 'tensors that differ')} "
            f"({share}), first {found.left_out[0]}"
        )
    family, ratio = str(family_of(tuned.tensors)), tuned.config.get("mlp_ratio", 4.0)
    save_lora(flags.source, found.adapters, 1.0, family, flags, mlp_ratio=ratio, base=base_name)


def describe_error(found: Extraction) -> str:
    """Return the error of an extraction: of the whole difference, and of the worst layer."""
    worst = max(found.errors, key=lambda layer: found.errors[layer])
    text = f"{100 * found.error:.3g} % of the difference (Frobenius norm)"
    return f"{text}; the largest of a layer is {100 * found.errors[worst]:.3g} % in {worst}"


def warn_other_base(path: Path, base: LayoutTensors) -> None:
    """Print a note if a checkpoint's adapters were trained on other base weights: intended, or a mistake."""
    settings = path.parent / SETTINGS_FILE
    if settings.is_file() and read_json(settings).get("base") != fingerprint(base):
        print(f"note: {path} was trained on other weights than {base.path}, or on the same in another dtype")


# --------------------------------------------------------------------------------------------------------- model


@contextmanager
def explain_write_errors(output: Path) -> Iterator[None]:
    """Turn a failed write into a UserError (STORAGE) with a hint."""
    try:
        yield
    except (OSError, SaveError) as why:
        cause = why.__context__ if isinstance(why, SaveError) and why.__context__ else why
        reason = getattr(cause, "strerror", None) or cause
        hint = "pass a path that is writable, on a disk with enough free space"
        raise UserError("output", f"{output} cannot be written ({reason})", hint, STORAGE) from why


def export_model(
    tensors: list[TensorToWrite], config: str, metadata: dict[str, str], flags: argparse.Namespace
) -> int:
    """Write a model in the layout of --layout.

    Args:
        tensors: the tensors to write, in that layout.
        config: configuration of the model (JSON text).
        metadata: fields of each file's header.
        flags: the command line.

    Returns:
        The size of all tensors in bytes.
    """
    size = sum(tensor.nbytes for tensor in tensors)
    output = flags.output.resolve()
    check_disk_space(output, size, "output")
    with tqdm(total=size * (1 + flags.verify), unit="B", unit_scale=True, desc="exporting", disable=None) as bar:
        if flags.layout != "diffusers":
            with explain_write_errors(output):
                output.parent.mkdir(parents=True, exist_ok=True)
                write_file(output, tensors, metadata, verify=flags.verify, on_progress=bar.update)
            return size
        with explain_write_errors(output), atomic_folder(output) as folder:
            checksums = write_folder(
                folder,
                tensors,
                max_shard_size=flags.max_shard_size,
                with_checksums=flags.verify,
                on_progress=bar.update,
                metadata=metadata,
            )
            (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
            check_folder(folder, tensors)
            if flags.verify:
                check_bytes(folder, checksums, bar.update)
    return size


def check_flags(flags: argparse.Namespace, lora: Path | None) -> bool:
    """Check the flags against each other and the source; return whether the output is a LoRA. Raises UserError."""
    if flags.base and lora is None:
        raise UserError("--base", f"{flags.source} is not a LoRA", "remove --base, or pass a LoRA", FLAGS)
    if flags.config is not None and not flags.config.is_file():
        raise UserError("--config", f"{flags.config} is not a file", "pass a config.json", MODEL)
    if flags.extract_lora:
        rank = flags.extract_lora[0]
        if not rank.isdecimal() or not 1 <= int(rank) <= MAX_RANK:
            what = f"{rank!r} is not a rank from 1 to {MAX_RANK}"
            raise UserError("--extract_lora", what, "pass --extract_lora RANK BASE, e.g. 64 and the base model", FLAGS)
        if lora is not None:
            what = f"{flags.source} is a LoRA already"
            raise UserError("--extract_lora", what, "pass the model after training, or remove --extract_lora", FLAGS)
    makes_lora = bool(flags.extract_lora) or (lora is not None and not flags.base)
    if makes_lora and flags.layout == "original":
        what, hint = "original is not a layout of a LoRA", "use comfyui, which has the original names, or kohya"
        raise UserError("--layout", what, hint, FLAGS)
    if flags.layout == KOHYA and not makes_lora:
        raise UserError("--layout", "kohya is a layout of LoRAs only", "use diffusers, original or comfyui", FLAGS)
    check_output(flags.source, flags.output, LORA if makes_lora else flags.layout)
    return makes_lora


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    flags.source = one_expert(flags.source, flags.expert)
    lora, dtype = lora_file(flags.source), EXPORT_DTYPES[flags.dtype] if flags.dtype else None
    if check_flags(flags, lora):
        extract(flags) if lora is None else export_lora(lora, flags)
        return 0
    expert = flags.expert or (read_metadata(lora).get("expert") if lora else None)
    base = find_weights(local_folder(flags.base, "--base"), "--base", expert) if flags.base else None
    source = base or find_weights(flags.source)
    component = find_transformer(source, flags.config)
    assert component.tensors is not None
    model, family = build_model(component), component.tensors.layout or str(family_of(component.tensors))
    keep_fp32 = type(model)._keep_in_fp32_modules or () if flags.layout == "diffusers" else ()
    updates = {}
    if lora is not None:
        warn_other_base(lora, component.tensors)
        updates = lora_updates(*load_adapters(lora, family))
    tensors = merge_lora(component.tensors, updates, flags.layout, dtype, keep_fp32)
    facts = {"architecture": ARCHITECTURES[family], "layout": flags.layout, "lora": lora and lora.parent.name}
    facts["dtype"] = flags.dtype
    print(f"{component.path}: {component.tensors.layout or 'diffusers'} names, {len(component.tensors)} tensors")
    if updates:
        print(f"{lora}: {len(updates)} {plural(len(updates), 'layer')} adapted")
    config = json.loads(model.to_json_string())
    if flags.layout != "diffusers":
        facts[MODEL_CONFIG] = json.dumps({k: v for k, v in config.items() if k != "_name_or_path"}, sort_keys=True)
    metadata = make_metadata(lora or flags.source, facts, flags.base)
    size = export_model(tensors, json.dumps(config, indent=2, sort_keys=True), metadata, flags)
    usage = {
        "diffusers": f"load it with {type(model).__name__}.from_pretrained, or continue training with --transformer_path",
        "original": "it has the published names; continue training with --transformer_path",
        "comfyui": "copy it to ComfyUI's folder models/diffusion_models",
    }
    print(f"{flags.output.resolve()}: {format_bytes(size)}, checked; {usage[flags.layout]}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the temporary folder is removed
    run_script(main)
