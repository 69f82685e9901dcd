"""Serves whoever takes a transformer from one program to another: from any layout to any, a block at a time.

    python scripts/export.py outputs/wan/checkpoint-500 wan.safetensors --layout comfyui --dtype bf16
    python scripts/export.py outputs/wan/transformer    wan.safetensors --layout original
    python scripts/export.py wan2.1_t2v_14B_bf16.safetensors a_new_folder --layout diffusers

It reads a run's checkpoint-N or transformer folder, a transformer folder of diffusers, Wan's original folder, and
single files (.safetensors, .pt, .pth), bf16, fp16, float32 or 8-bit with scales. `diffusers` makes a folder that
from_pretrained loads, `original` one file with the published names, `comfyui` the same for ComfyUI's folder
diffusion_models. What is there is never overwritten, the result is whole or absent, and nothing that lies in a file is
run. A checkpoint in shards goes through scripts/zero_to_bf16.py first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from tqdm import tqdm
from zero_to_bf16 import published, readable, refuse_full_disk, refuse_place, shard_size, whole_weights

from videox.args import EXPORT_DTYPES
from videox.checkpoint import MANIFEST, verify
from videox.errors import FLAGS, MODEL, Refusal
from videox.exports import ARCHITECTURES, LAYOUTS, describe, relaid, write_file
from videox.fsdp_shards import fsdp_folder
from videox.layouts import family_of
from videox.lifecycle import run_script
from videox.model_folder import UNLOADABLE, read_json
from videox.model_parts import Part, find_part, refuse_misfit
from videox.shards import EIGHT_BITS
from videox.streaming import Planned, check_bytes, check_folder, planned, write_folder
from videox.tensor_files import open_tensors
from videox.weights import CONFIG, few
from videox.zero_shards import tag_folder

CLASSES = {"wan": "WanTransformer3DModel", "hunyuan": "HunyuanVideoTransformer3DModel"}


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="folder or file of weights")
    parser.add_argument("output", type=Path, help="a new folder for diffusers, else a new .safetensors file")
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
        "--max_shard_size", type=shard_size, default="10GB", help="bytes per file of a diffusers folder (default 10GB)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="also compare every byte written with what is read back (default: no)"
    )
    return parser.parse_args(argv)


def source_path(source: Path) -> Path:
    """Returns the folder or file with the transformer's weights.

    Raises:
        Refusal: (MODEL) a checkpoint is damaged or holds shards alone, or nothing is there.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise Refusal("source", f"{source} is not there", "name a checkpoint-N, a transformer folder or a file", MODEL)
    if (source / MANIFEST).is_file() and (problems := verify(source, hashes=False)):
        raise Refusal(str(source), f"is damaged: {few(problems)}", "export another checkpoint", MODEL)
    if (folder := whole_weights(source)) is not None:
        return folder
    if tag_folder(source, None) is not None or fsdp_folder(source, None) is not None:
        what = f"{source} holds its weights in the shards of several processes"
        raise Refusal("source", what, f"run scripts/zero_to_bf16.py {source} FOLDER first, then export FOLDER", MODEL)
    return source


def find_transformer(path: Path, config: Path | None) -> Part:
    """Returns the transformer that the weights are, with its configuration. Raises Refusal (MODEL)."""
    tensors = open_tensors(path)
    family = tensors.layout or family_of(tensors)
    if family not in CLASSES:
        what = f"holds {family or 'tensors of no known kind'}, no transformer of {' or '.join(ARCHITECTURES.values())}"
        raise Refusal(str(path), what, "give the weights of a transformer", MODEL)
    beside = config or (path.parent / CONFIG if path.is_file() else None)
    known = read_json(beside) if beside and (config or beside.is_file()) else {}
    part = find_part(path, family, known)
    return Part(part.path, part.config, tensors)  # those of a diffusers folder, too


def model_of(part: Part) -> Any:  # noqa: ANN401 - of diffusers
    """Returns the model that a configuration describes, without its memory, after its tensors have been compared."""
    import diffusers  # seconds; a flag that is wrong is told before

    assert part.tensors is not None
    model_class = getattr(diffusers, CLASSES[part.tensors.layout or str(family_of(part.tensors))])
    try:
        with init_empty_weights():
            model = model_class.from_config(part.config)
    except UNLOADABLE as why:
        raise Refusal(
            str(part.path), f"its configuration makes no model ({why})", "give --config FILE", MODEL
        ) from why
    refuse_misfit(part.tensors, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    return model


def refuse_output(source: Path, output: Path, layout: str) -> None:
    """Raises Refusal if the output is taken, is the source, or has a name of the other kind."""
    if layout == "diffusers":
        refuse_place(source, output)
        return
    if output.suffix != ".safetensors":
        raise Refusal("output", f"{output} is no name of a .safetensors file", "name one", FLAGS)
    if os.path.lexists(output):
        raise Refusal("output", f"{output} exists", "name a new file, or remove it", FLAGS)


def chosen(part: Part, layout: str, dtype: str | None, keep_fp32: Sequence[str]) -> list[Planned]:
    """Returns the tensors to write, each with its dtype."""
    assert part.tensors is not None
    tensors = relaid(part.tensors, layout)
    if dtype is not None:
        return planned(tensors, EXPORT_DTYPES[dtype], keep_fp32 if layout == "diffusers" else ())
    return [Planned(tensor, torch.bfloat16 if tensor.dtype in EIGHT_BITS else tensor.dtype) for tensor in tensors]


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    refuse_output(flags.source, flags.output, flags.layout)
    part = find_transformer(source_path(flags.source), flags.config)
    assert part.tensors is not None
    model = model_of(part)
    tensors = chosen(part, flags.layout, flags.dtype, type(model)._keep_in_fp32_modules or ())
    size = sum(tensor.nbytes for tensor in tensors)
    output = flags.output.resolve()
    refuse_full_disk(output, size)
    family = part.tensors.layout or str(family_of(part.tensors))
    metadata = describe(str(flags.source), {"architecture": ARCHITECTURES[family], "layout": flags.layout})
    print(f"{part.path}: {part.tensors.layout or 'diffusers'} names, {len(part.tensors)} tensors")
    with tqdm(total=size * (1 + flags.verify), unit="B", unit_scale=True, desc="exporting", disable=None) as bar:
        if flags.layout != "diffusers":
            output.parent.mkdir(parents=True, exist_ok=True)
            write_file(output, tensors, metadata, verify=flags.verify, told=bar.update)
        else:
            with published(output) as folder:
                checksums = write_folder(
                    folder, tensors, max_shard_size=flags.max_shard_size, with_checksums=flags.verify,
                    told=bar.update, metadata=metadata,
                )  # fmt: skip
                config = json.dumps(json.loads(model.to_json_string()), indent=2, sort_keys=True)
                (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
                check_folder(folder, tensors)
                if flags.verify:
                    check_bytes(folder, checksums, bar.update)
    use = {
        "diffusers": f"load it with {type(model).__name__}.from_pretrained, or train on by --transformer_path",
        "original": "it has the published names; train on by --transformer_path",
        "comfyui": "put it into ComfyUI's folder models/diffusion_models",
    }
    print(f"{output}: {readable(size)}, checked; {use[flags.layout]}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is half written is then removed
    run_script(main)
