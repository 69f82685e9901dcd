"""Serves whoever wants to use what a sharded run has trained: a ZeRO or FSDP checkpoint becomes a diffusers folder.

    python scripts/zero_to_bf16.py output_dir/checkpoint-N output_dir/checkpoint-N-outputs \
        --max_shard_size 80GB --safe_serialization

It reads what DeepSpeed saved with ZeRO-1, -2 or -3 (this trainer, VideoX-Fun or a bare engine, any number of ranks),
what FSDP saved as SHARDED_STATE_DICT, and the whole weights of a checkpoint that has no shards. Every floating tensor
becomes the bfloat16 of the float32 master; other tensors stay as they are. The folder is whole or absent, it needs as
much memory as a block of a tensor, and nothing that lies in the checkpoint is run.
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

from videox.errors import MODEL, STORAGE, UserError
from videox.files import SaveError, flush, flush_tree
from videox.run.checkpoint import MANIFEST, verify
from videox.run.lifecycle import run_script
from videox.weights.deepspeed_reader import LATEST, read_zero, tag_folder
from videox.weights.fsdp_reader import FOLDERS, fsdp_folder, read_fsdp
from videox.weights.lazy_tensor import Shards, read_whole
from videox.weights.safetensors_io import CONFIG, WEIGHTS, few
from videox.weights.stream_writer import Planned, check_bytes, check_folder, planned, refuse_other_model, write_folder

TRANSFORMER = "transformer"
LOADS = "{} already holds the weights whole: from_pretrained(..., torch_dtype=torch.bfloat16) loads it as it is"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint_dir", type=Path, help="folder of the checkpoint, output_dir/checkpoint-N")
    parser.add_argument("output_dir", type=Path, help="folder to make; it must not exist, or be empty")
    parser.add_argument(
        "--max_shard_size",
        type=shard_size,
        default="80GB",
        help="bytes of weights per file, as 5GB, 500MB, 2GiB or a number (default 80GB: most models are one file)",
    )
    parser.add_argument(
        "--safe_serialization",
        action="store_true",
        help="accepted as published: the weights are safetensors with it and without",
    )
    parser.add_argument(
        "-t", "--tag", help="folder inside the checkpoint to read (default: what its file 'latest' says, or FSDP's)"
    )
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="ZeRO: leave out what was not trained (default: no)"
    )
    parser.add_argument(
        "--config", type=Path, help="config.json of the model (default: the checkpoint's own, transformer/ first)"
    )
    parser.add_argument(
        "--keep_fp32_modules",
        nargs="*",
        metavar="NAME",
        help="modules that stay float32; without names those that diffusers keeps so for the config's _class_name "
        "(default: none, all floating tensors become bfloat16)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also compare the checkpoint's hashes where it has a manifest, the names and shapes with the config's "
        "model, and every byte written with what is read back (default: sizes, headers, names, shapes)",
    )
    return parser.parse_args(argv)


def shard_size(text: str) -> int:
    """Returns bytes. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 80GB, 500MB or 2GiB")
    return max(1, int(float(match[1]) * UNITS[match[2].upper()]))


def readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


# ------------------------------------------------------------------------------------------------ what to read


def open_checkpoint(checkpoint: Path, tag: str | None, exclude_frozen: bool) -> Shards:
    """Returns the tensors of a checkpoint: its shards where it has any, else its whole weights.

    Raises:
        UserError: (MODEL) it holds neither, or they are damaged.
    """
    if not checkpoint.is_dir():
        raise UserError("checkpoint_dir", f"{checkpoint} is no folder", "name a folder checkpoint-N", MODEL)
    if (zero := tag_folder(checkpoint, tag)) is not None:
        return with_notes(read_zero(zero, exclude_frozen=exclude_frozen), checkpoint)
    if exclude_frozen:
        what = f"{checkpoint} does not say which parameters were frozen; only ZeRO's shards do"
        raise UserError("--exclude_frozen_parameters", what, "leave the flag out")
    if (fsdp := fsdp_folder(checkpoint, tag)) is not None:
        return with_notes(read_fsdp(fsdp), checkpoint)
    if tag is not None:
        raise UserError("--tag", f"{tag!r} names no folder of shards in {checkpoint}", "leave the flag out", MODEL)
    if (folder := whole_weights(checkpoint)) is not None:
        tensors = read_whole(folder)
        floating = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
        stored = "float32" if torch.float32 in floating else "16-bit"
        note = f"{folder} already holds 16-bit weights and loads as it is"
        if stored == "float32":
            note = LOADS.format(folder)
        return Shards(f"whole {stored} weights in {folder.name}", tensors, (note,))
    found = few(sorted(path.name for path in checkpoint.iterdir())) or "nothing"
    what = f"{checkpoint} holds no ZeRO or FSDP shards and no weights (looked for {LATEST}, {FOLDERS}, "
    what += f"{TRANSFORMER}/{WEIGHTS}*.safetensors; found: {found})"
    raise UserError("checkpoint_dir", what, "name a folder checkpoint-N of a training run", MODEL)


def whole_weights(checkpoint: Path) -> Path | None:
    """Returns the folder with a checkpoint's whole weights, if it has them."""
    for folder in (checkpoint / TRANSFORMER, checkpoint):
        if any((folder / f"{WEIGHTS}.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
            return folder
    return None


def with_notes(shards: Shards, checkpoint: Path) -> Shards:
    """Adds a word for the user who need not convert: the weights may lie there whole already."""
    folder = whole_weights(checkpoint)
    if folder is None:
        return shards
    try:
        note = f"{folder} already holds the 16-bit weights whole; the float32 masters of the shards are converted here"
        if any(tensor.dtype == torch.float32 for tensor in read_whole(folder)):
            note = LOADS.format(folder)
    except UserError as broken:
        note = f"{broken.where} {broken.what}; it is not used, the float32 masters of the shards are converted"
    return Shards(shards.kind, shards.tensors, (*shards.notes, note))


def find_config(checkpoint: Path, given: Path | None) -> tuple[Path, bytes]:
    """Returns the model's config.json, by path and content.

    Raises:
        UserError: (MODEL) there is none, or it is no JSON object.
    """
    places = [given / CONFIG if given.is_dir() else given] if given else []
    places = places or [checkpoint / TRANSFORMER / CONFIG, checkpoint / CONFIG]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        what = f"no {CONFIG} (looked for {' and '.join(map(str, places))})"
        hint = "give --config FILE, the config.json in the transformer folder of the model that was trained"
        raise UserError("--config" if given else str(checkpoint), what, hint, MODEL)
    content = path.read_bytes()
    try:
        if not isinstance(json.loads(content), dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise UserError(str(path), f"is no JSON of a model ({error})", "give --config FILE", MODEL) from error
    return path, content


def model_class(path: Path, config: bytes) -> type[Any]:
    """Returns the diffusers class that a config names. Raises UserError (MODEL)."""
    import diffusers  # seconds; most conversions need none of it

    name = json.loads(config).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) and not name.startswith("_") else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise UserError(str(path), f"names the class {name!r}, which diffusers does not have", "give --config", MODEL)
    return found


def shapes_of_model(path: Path, config: bytes) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of the model that a config describes, without its memory. Raises UserError."""
    kind = model_class(path, config)
    try:
        with torch.device("meta"):
            model = kind.from_config(json.loads(config))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            str(path), f"does not build a {kind.__name__} ({error})", "give --config FILE", MODEL
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------- where to write


def refuse_place(checkpoint: Path, output: Path, where: str = "output_dir") -> None:
    """Raises UserError, of `where`, if the output is the checkpoint, is in it or holds it, is taken, or is no folder."""
    source, target = checkpoint.resolve(), output.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(where, f"{output} is {checkpoint}, or one is inside the other", "name a folder beside it")
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(where, f"{output} exists and is no folder", "name a new folder")
    if output.is_dir() and (there := sorted(path.name for path in output.iterdir())):
        raise UserError(where, f"{output} is not empty (found: {few(there)})", "name a new folder, or remove it")


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `output` when all went well, and is gone otherwise.

    The folder is locked while it is written, so that what a killed conversion left is told from a living one's.

    Raises:
        SaveError: the disk refused.
    """
    mark = f".converting-{output.name}-"
    temporary = output.with_name(mark + secrets.token_hex(6))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in [path for path in output.parent.iterdir() if path.name.startswith(mark)]:
            remove_unlocked(left)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
            flush_tree(temporary)
            temporary.rename(output)  # over an empty folder, never over a full one
            flush(output.parent)
        finally:
            os.close(lock)
    except OSError as error:
        raise SaveError(f"{output}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unlocked(folder: Path) -> None:
    """Removes a folder that no living conversion holds. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        print(f"{folder} is being written by another conversion and is left alone")
    finally:
        os.close(handle)


def refuse_full_disk(output: Path, size: int, where: str = "output_dir") -> None:
    """Raises UserError (STORAGE) before the first byte if the disk cannot hold the result."""
    parent = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size:
        what = f"{readable(size)} are needed in {parent}, {readable(free)} are free"
        raise UserError(where, what, "free some space, or name a folder on another disk", STORAGE)


def write_model(output: Path, tensors: list[Planned], config: bytes, max_shard_size: int, reread: bool) -> None:
    """Writes the diffusers folder, checks it and gives it its name.

    Raises:
        UserError: (NUMERICS) values that are not finite in bfloat16, (MODEL) a shard is cut short.
        SaveError: the disk refused, or gives back something else.
    """
    size = sum(tensor.nbytes for tensor in tensors)
    with (
        published(output) as folder,
        tqdm(total=size * (2 if reread else 1), unit="B", unit_scale=True, desc="converting", disable=None) as bar,
    ):
        checksums = write_folder(
            folder, tensors, max_shard_size=max_shard_size, with_checksums=reread, told=bar.update
        )
        (folder / CONFIG).write_bytes(config)
        check_folder(folder, tensors)
        if reread:
            check_bytes(folder, checksums, bar.update)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    checkpoint, output = flags.checkpoint_dir, flags.output_dir.resolve()
    refuse_place(checkpoint, output)
    shards = open_checkpoint(checkpoint, flags.tag, flags.exclude_frozen_parameters)
    if (checkpoint / MANIFEST).is_file() and (problems := verify(checkpoint, hashes=flags.verify)):
        hint = f"convert another checkpoint, or remove its {MANIFEST} to convert what is there"
        raise UserError(str(checkpoint), f"is damaged: {few(problems)}", hint, MODEL)
    config_path, config = find_config(checkpoint, flags.config)
    kept = flags.keep_fp32_modules
    if kept == []:
        kept = getattr(model_class(config_path, config), "_keep_in_fp32_modules", None)
    tensors = planned(shards.tensors, torch.bfloat16, kept or ())
    if not tensors:
        raise UserError(str(checkpoint), f"({shards.kind}) holds no tensor", "convert another checkpoint", MODEL)
    if flags.verify:
        refuse_other_model(tensors, shapes_of_model(config_path, config), str(config_path))
    size = sum(tensor.nbytes for tensor in tensors)
    refuse_full_disk(output, size)
    print(f"{checkpoint}: {shards.kind}; {len(tensors)} tensors")
    for note in shards.notes:
        print(f"note: {note}")
    write_model(output, tensors, config, flags.max_shard_size, flags.verify)
    print(f"{output}: {readable(size)}, checked; load it with from_pretrained(..., torch_dtype=torch.bfloat16)")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is half written is then removed
    run_script(main)
