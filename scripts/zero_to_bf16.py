"""Converts a sharded training checkpoint (DeepSpeed ZeRO or FSDP) to a bfloat16 diffusers folder.

    python scripts/zero_to_bf16.py output_dir/checkpoint-N output_dir/checkpoint-N-outputs \
        --max_shard_size 80GB --safe_serialization

It reads checkpoints of DeepSpeed ZeRO-1, -2 or -3 (saved by this trainer, by VideoX-Fun or by a bare engine, with any
number of ranks), FSDP checkpoints of type SHARDED_STATE_DICT, and full weights in a checkpoint without shards. Every
floating-point tensor is the bfloat16 of the float32 master weight; other tensors keep their dtype. The names and the
configuration of Wan's original code, which VideoX-Fun trains, are converted to those of diffusers. The output folder
appears atomically, memory use is a block of a tensor for any model size, and no code in the checkpoint is run.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from videox.errors import MODEL, STORAGE, SaveError, UserError
from videox.files import flush, flush_tree
from videox.models.infer_config import foreign_kind
from videox.run.checkpoint import MANIFEST, verify
from videox.run.lifecycle import run_script
from videox.weights.deepspeed_reader import LATEST, read_zero, tag_folder
from videox.weights.expert_names import EXPERTS
from videox.weights.fsdp_reader import FOLDERS, fsdp_folder, read_fsdp
from videox.weights.lazy_tensor import CheckpointTensors, read_folder
from videox.weights.safetensors_io import CONFIG, WEIGHTS, join_first
from videox.weights.stream_writer import (
    TensorToWrite,
    check_bytes,
    check_folder,
    plan_tensors,
    refuse_other_model,
    write_folder,
)

TRANSFORMER = "transformer"
LORA_MARKS = (".lora_A.", ".lora_down.")  # in the names of adapters
LOADS = "{} already contains the full weights: from_pretrained(..., torch_dtype=torch.bfloat16) loads it directly"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint_dir", type=Path, help="folder of the checkpoint, output_dir/checkpoint-N")
    parser.add_argument("output_dir", type=Path, help="folder to create; it must not exist, or be empty")
    parser.add_argument(
        "--max_shard_size",
        type=shard_size,
        default="80GB",
        help="maximum size of a weights file: 5GB, 500MB, 2GiB or a number of bytes (default: 80GB, one file for most models)",
    )
    parser.add_argument(
        "--safe_serialization",
        action="store_true",
        help="accepted for compatibility; the weights are always safetensors",
    )
    parser.add_argument(
        "-t",
        "--tag",
        help="folder inside the checkpoint to read (default: from its file 'latest', or the FSDP folder)",
    )
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="ZeRO only: leave out frozen parameters"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="config.json of the model (default: transformer/config.json or config.json in the checkpoint)",
    )
    parser.add_argument(
        "--keep_fp32_modules",
        nargs="*",
        metavar="NAME",
        help="modules that stay float32; without names the _keep_in_fp32_modules of the model's diffusers class "
        "(default: none, all floating-point tensors become bfloat16)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also verify the checkpoint's hashes if it has a manifest, compare names and shapes with the model of the "
        "config, and read back every byte written (without it: sizes, headers, names and shapes are checked)",
    )
    return parser.parse_args(argv)


def shard_size(text: str) -> int:
    """Parse a size such as 5GB, 500MB or 2GiB into bytes. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 80GB, 500MB or 2GiB")
    return max(1, int(float(match[1]) * UNITS[match[2].upper()]))


def format_bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


# -------------------------------------------------------------------------------------------------------- source


def open_checkpoint(checkpoint: Path, tag: str | None, exclude_frozen: bool) -> CheckpointTensors:
    """Locate the tensors of a checkpoint: its shards if it has any, else its full weights.

    Args:
        checkpoint: folder of the checkpoint.
        tag: folder with the shards inside it; None detects it.
        exclude_frozen: leave out frozen parameters (ZeRO only).

    Raises:
        UserError: (MODEL) there are neither shards nor weights, or they are damaged.
    """
    if not checkpoint.is_dir():
        raise UserError("checkpoint_dir", f"{checkpoint} is not a folder", "pass a folder checkpoint-N", MODEL)
    if (zero := tag_folder(checkpoint, tag)) is not None:
        return add_notes(read_zero(zero, exclude_frozen=exclude_frozen), checkpoint)
    if exclude_frozen:
        what = f"{checkpoint} does not record which parameters are frozen; only ZeRO shards do"
        raise UserError("--exclude_frozen_parameters", what, "remove the flag")
    if (fsdp := fsdp_folder(checkpoint, tag)) is not None:
        return add_notes(read_fsdp(fsdp), checkpoint)
    if tag is not None:
        raise UserError("--tag", f"{tag!r} is not a folder of shards in {checkpoint}", "remove the flag", MODEL)
    if (folder := find_full_weights(checkpoint)) is not None:
        tensors = read_folder(folder)
        floating = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
        stored = "float32" if torch.float32 in floating else "16-bit"
        note = f"{folder} already contains 16-bit weights and can be loaded directly"
        if stored == "float32":
            note = LOADS.format(folder)
        return CheckpointTensors(f"full {stored} weights in {folder.name}", tensors, (note,))
    found = join_first(sorted(path.name for path in checkpoint.iterdir())) or "nothing"
    what = f"{checkpoint} contains no ZeRO or FSDP shards and no weights (looked for {LATEST}, {FOLDERS}, "
    what += f"{TRANSFORMER}/{WEIGHTS}*.safetensors; found: {found})"
    raise UserError("checkpoint_dir", what, "pass a folder checkpoint-N of a training run", MODEL)


def find_full_weights(checkpoint: Path) -> Path | None:
    """Return the folder with a checkpoint's full weights; None if it has none."""
    for folder in (*(checkpoint / name for name in EXPERTS.values()), checkpoint):
        if any((folder / f"{WEIGHTS}.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
            return folder
    return None


def add_notes(shards: CheckpointTensors, checkpoint: Path) -> CheckpointTensors:
    """Add a note if the checkpoint already contains full weights, so that no conversion is needed."""
    folder = find_full_weights(checkpoint)
    if folder is None:
        return shards
    try:
        note = f"{folder} already contains the full 16-bit weights; the float32 master weights in the shards are converted"
        if any(tensor.dtype == torch.float32 for tensor in read_folder(folder)):
            note = LOADS.format(folder)
    except UserError as broken:
        note = f"{broken.where} {broken.what}; it is ignored, the float32 master weights in the shards are converted"
    return CheckpointTensors(shards.kind, shards.tensors, (*shards.notes, note))


def find_config(checkpoint: Path, given: Path | None) -> tuple[Path, bytes] | None:
    """Find the model's config.json; return its path and content, None if the checkpoint has none.

    Args:
        checkpoint: folder of the checkpoint.
        given: value of --config, a file or its folder; None searches the checkpoint.

    Raises:
        UserError: (MODEL) the given one does not exist, or it is not a JSON object.
    """
    candidates = config_candidates(checkpoint, given)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        if given is not None:
            raise no_config(checkpoint, given)
        return None
    content = path.read_bytes()
    try:
        if not isinstance(json.loads(content), dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise UserError(str(path), f"is not the JSON of a model ({error})", "pass --config FILE", MODEL) from error
    return path, content


def config_candidates(checkpoint: Path, given: Path | None) -> list[Path]:
    """List the paths where a model's config.json may be; parameters as for find_config."""
    if given:
        return [given / CONFIG if given.is_dir() else given]
    return [checkpoint / TRANSFORMER / CONFIG, checkpoint / CONFIG]


def no_config(checkpoint: Path, given: Path | None) -> UserError:
    """Return the error for a model without config.json; parameters as for find_config."""
    what = f"no {CONFIG} (looked for {' and '.join(map(str, config_candidates(checkpoint, given)))})"
    hint = "pass --config FILE, the config.json in the transformer folder of the model that was trained"
    return UserError("--config" if given else str(checkpoint), what, hint, MODEL)


def to_diffusers_model(
    checkpoint: Path, shards: CheckpointTensors, found: tuple[Path, bytes] | None
) -> tuple[CheckpointTensors, tuple[Path, bytes]]:
    """Return a checkpoint with diffusers' names and configuration, converted if it has others.

    Args:
        checkpoint: folder of the checkpoint.
        shards: its tensors.
        found: of find_config.

    Raises:
        UserError: (MODEL) it contains a LoRA, there is no configuration, or it does not fit the tensors.
    """
    if any(mark in tensor.name for tensor in shards.tensors for mark in LORA_MARKS):
        own = sorted(checkpoint.rglob("*lora*.safetensors"))
        hint = f"pass {own[0]} to --init_lora_from or scripts/export.py" if own else "pass the LoRA file of the run"
        what = "contains the adapters of a LoRA, which no folder of a model holds"
        raise UserError(str(checkpoint), what, hint, MODEL)
    config = None if found is None else json.loads(found[1])
    kind = foreign_kind((tensor.name for tensor in shards.tensors), config)
    if kind is None:
        if found is None:
            raise no_config(checkpoint, None)
        return shards, found
    from videox.models import original_names  # imported here: it imports diffusers, which takes seconds

    tensors, converted = original_names.to_diffusers(checkpoint, shards.tensors, kind, config)
    # Full weights in the checkpoint have the same names, so that diffusers does not load them directly.
    notes = [note for note in shards.notes if not note.endswith("directly")]
    notes.append(f"names and configuration are converted to those of diffusers' {converted['_class_name']}")
    path = checkpoint / CONFIG if found is None else found[0]
    content = json.dumps(converted, indent=2, sort_keys=True) + "\n"
    return CheckpointTensors(shards.kind, tuple(tensors), tuple(notes)), (path, content.encode())


def model_class(path: Path, config: bytes) -> type[Any]:
    """Return the diffusers class that a config names. Raises UserError (MODEL)."""
    import diffusers  # imported here: it takes seconds, and most conversions do not need it

    name = json.loads(config).get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and not name.startswith("_") else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise UserError(str(path), f"names the class {name!r}, which diffusers does not have", "pass --config", MODEL)
    return cls


def model_shapes(path: Path, config: bytes) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the model that a config describes, on the meta device. Raises UserError."""
    cls = model_class(path, config)
    try:
        with torch.device("meta"):
            model = cls.from_config(json.loads(config))
    except (TypeError, ValueError, KeyError) as error:
        what = f"does not build a {cls.__name__} ({error})"
        raise UserError(str(path), what, "pass --config FILE", MODEL) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# -------------------------------------------------------------------------------------------------------- output


def check_output_folder(checkpoint: Path, output: Path, where: str = "output_dir") -> None:
    """Raise UserError if the output is the checkpoint, inside it or above it, is not a folder, or is not empty.

    Args:
        checkpoint: the source.
        output: the folder to create.
        where: name of the command-line argument, for the message.
    """
    source, target = checkpoint.resolve(), output.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(where, f"{output} is {checkpoint}, or one is inside the other", "pass a folder outside of it")
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(where, f"{output} exists and is not a folder", "pass a new folder")
    if output.is_dir() and (names := sorted(path.name for path in output.iterdir())):
        raise UserError(
            where, f"{output} is not empty (found: {join_first(names)})", "pass a new folder, or remove it"
        )


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it is renamed to `output` on success and removed on an error.

    The temporary folder is locked (flock) while it is written: folders that a killed conversion left behind are
    unlocked and are removed by the next one.

    Raises:
        SaveError: the folder cannot be written.
    """
    prefix = f".converting-{output.name}-"
    temporary = output.with_name(prefix + secrets.token_hex(6))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in [path for path in output.parent.iterdir() if path.name.startswith(prefix)]:
            remove_unlocked(leftover)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
            flush_tree(temporary)
            temporary.rename(output)  # replaces an empty folder, fails for any other
            flush(output.parent)
        finally:
            os.close(lock)
    except OSError as error:
        raise SaveError(f"{output}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unlocked(folder: Path) -> None:
    """Remove a temporary folder unless a running conversion has locked it. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        print(f"{folder} is being written by another conversion and is not removed")
    finally:
        os.close(handle)


def check_disk_space(output: Path, size: int, where: str = "output_dir") -> None:
    """Raise UserError (STORAGE), before the first byte is written, if there is not enough free disk space."""
    parent = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size:
        what = f"{format_bytes(size)} are needed in {parent}, {format_bytes(free)} are free"
        raise UserError(where, what, "free disk space, or pass a folder on another disk", STORAGE)


def write_model(
    output: Path, tensors: list[TensorToWrite], config: bytes, max_shard_size: int, verify_bytes: bool
) -> None:
    """Write the diffusers folder and check it.

    Args:
        output: the folder to create.
        tensors: the tensors to write, with their dtypes.
        config: content of config.json.
        max_shard_size: bytes of tensors per file.
        verify_bytes: read back every byte.

    Raises:
        UserError: (NUMERICS) values are not finite in bfloat16, (MODEL) a shard is truncated.
        SaveError: the folder cannot be written, or reads back differently.
    """
    size = sum(tensor.nbytes for tensor in tensors)
    with (
        atomic_folder(output) as folder,
        tqdm(
            total=size * (2 if verify_bytes else 1), unit="B", unit_scale=True, desc="converting", disable=None
        ) as bar,
    ):
        checksums = write_folder(
            folder, tensors, max_shard_size=max_shard_size, with_checksums=verify_bytes, on_progress=bar.update
        )
        (folder / CONFIG).write_bytes(config)
        check_folder(folder, tensors)
        if verify_bytes:
            check_bytes(folder, checksums, bar.update)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    checkpoint, output = flags.checkpoint_dir, flags.output_dir.resolve()
    check_output_folder(checkpoint, output)
    shards = open_checkpoint(checkpoint, flags.tag, flags.exclude_frozen_parameters)
    if (checkpoint / MANIFEST).is_file() and (problems := verify(checkpoint, hashes=flags.verify)):
        hint = f"convert another checkpoint, or delete its {MANIFEST} to convert it anyway"
        raise UserError(str(checkpoint), f"is damaged: {join_first(problems)}", hint, MODEL)
    shards, (config_path, config) = to_diffusers_model(checkpoint, shards, find_config(checkpoint, flags.config))
    keep_fp32 = flags.keep_fp32_modules
    if keep_fp32 == []:  # the flag without names
        keep_fp32 = getattr(model_class(config_path, config), "_keep_in_fp32_modules", None)
    tensors = plan_tensors(shards.tensors, torch.bfloat16, keep_fp32 or ())
    if not tensors:
        raise UserError(str(checkpoint), f"({shards.kind}) contains no tensor", "convert another checkpoint", MODEL)
    if flags.verify:
        refuse_other_model(tensors, model_shapes(config_path, config), str(config_path))
    size = sum(tensor.nbytes for tensor in tensors)
    check_disk_space(output, size)
    print(f"{checkpoint}: {shards.kind}; {len(tensors)} tensors")
    for note in shards.notes:
        print(f"note: {note}")
    write_model(output, tensors, config, flags.max_shard_size, flags.verify)
    print(f"{output}: {format_bytes(size)}, verified; load it with from_pretrained(..., torch_dtype=torch.bfloat16)")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the temporary folder is removed
    run_script(main)
