"""Finds the files of one set of weights in a folder: one file or shards, with or without an index, under any name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videox.errors import MODEL, UserError
from videox.weights.safetensors_io import WEIGHTS, join_first

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")  # ComfyUI also writes .sft
STEMS = (WEIGHTS, "model")  # of diffusers and of transformers, in the order in which they are preferred
# Variants that diffusers and transformers write, the most precise first: model.fp16.safetensors.
VARIANTS = ("", "fp32", "bf16", "fp16")
SHARD = re.compile(r"-(\d{1,5})-of-(\d{1,5})")
INDEX = re.compile(r"(.+)\.safetensors\.index(?:\.(.+))?\.json")  # an index, and the variant in its name


@dataclass(frozen=True)
class WeightSet:
    """The files of one set of weights in a folder.

    Attributes:
        name: what its files' names have in common, such as "diffusion_pytorch_model.fp16".
        files: the files that exist.
        missing: names of the files that do not exist.
        index: the index that names them; None if there is none.
    """

    name: str
    files: tuple[Path, ...]
    missing: tuple[str, ...] = ()
    index: Path | None = None

    @property
    def rank(self) -> tuple[int, int] | None:
        """Return the order of preference of a set with a standard name, None for another name."""
        stem, _, variant = self.name.partition(".")
        if stem not in STEMS:
            return None
        return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), STEMS.index(stem)


def weight_sets(folder: Path) -> list[WeightSet]:
    """List the sets of safetensors weights in a folder, the preferred one first.

    Standard names precede others, sets with files those without, no variant precedes a variant, and diffusers' stem
    precedes transformers'.

    Args:
        folder: folder of a model or of one of its components.

    Raises:
        UserError: (MODEL) an index cannot be read, or names files outside of the folder.
    """
    present = sorted(path for path in folder.iterdir() if path.is_file())
    sets = [_indexed(path, match) for path in present if (match := INDEX.fullmatch(path.name))]
    indexed = {file for item in sets for file in item.files}
    groups: dict[tuple[str, int], dict[int, Path]] = {}
    for path in present:
        if path.suffix in SAFETENSORS_SUFFIXES and path not in indexed:
            name, number, count = _parse(path)
            groups.setdefault((name, count), {})[number] = path
    for (name, count), files in groups.items():
        absent = [_shard_name(files, number) for number in range(1, count + 1) if number not in files]
        sets.append(WeightSet(name, tuple(files.values()), tuple(absent)))
    # An index without any of its files was downloaded with all other .json files: it is no set to complete.
    return sorted(
        sets, key=lambda item: (item.rank is None, not item.files, item.rank or (0, 0), bool(item.missing), item.name)
    )


def _parse(path: Path) -> tuple[str, int, int]:
    """Split a file name into the name of its set, the number of the shard and the count of shards, 0 for no shard."""
    stem = path.name.removesuffix(path.suffix)
    match = SHARD.search(stem)
    if match is None:
        return stem, 0, 0
    return stem[: match.start()] + stem[match.end() :], int(match[1]), int(match[2])


def _shard_name(files: dict[int, Path], number: int) -> str:
    """Return the name that a missing shard has, from that of a shard that exists."""
    return SHARD.sub(lambda m: f"-{number:0{len(m[1])}d}-of-{m[2]}", next(iter(files.values())).name)


def _indexed(index: Path, match: re.Match[str]) -> WeightSet:
    names = sorted(set(read_weight_map(index).values()))
    if strays := [name for name in names if Path(name).name != name]:
        what = f"names {join_first(strays)}, which is outside its folder"
        raise UserError(str(index), what, "copy the model again", MODEL)
    paths = {name: index.parent / name for name in names}
    missing = tuple(name for name, path in paths.items() if not path.is_file())
    variant = f".{match[2]}" if match[2] else ""
    return WeightSet(
        f"{match[1]}{variant}", tuple(path for name, path in paths.items() if name not in missing), missing, index
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor from an index. Raises UserError (MODEL)."""
    try:
        content: Any = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(index), f"cannot be read as JSON ({error})", "copy the model again", MODEL) from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise UserError(str(index), "is not a JSON object", "copy the model again", MODEL)
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(str(index), "has no weight_map from tensors to files", "copy the model again", MODEL)
    return names


def chosen_set(folder: Path) -> WeightSet | None:
    """Return the set of weights that is read from a folder; None if the folder has no safetensors files.

    Files without standard names whose names differ in digits only (part1, part2) are one set.

    Raises:
        UserError: (MODEL) as weight_sets, or several files without a standard name could be meant.
    """
    sets = weight_sets(folder)
    if not sets or sets[0].rank is not None or len(sets) == 1:
        return sets[0] if sets else None
    if len({re.sub(r"\d+", "#", item.name) for item in sets}) > 1:
        what = f"contains several sets of weights ({join_first([item.name for item in sets])}), none with a usual name"
        hint = f"rename the files that are meant to {WEIGHTS}.safetensors, or move the others to another folder"
        raise UserError(str(folder), what, hint, MODEL)
    files = tuple(file for item in sets for file in item.files)
    missing = tuple(name for item in sets for name in item.missing)
    return WeightSet(" and ".join(item.name for item in sets), files, missing)


def has_standard_names(folder: Path, stem: str = WEIGHTS) -> bool:
    """Return whether from_pretrained finds the weights that are read from a folder, by their names.

    Args:
        folder: the component's folder.
        stem: that of the library, diffusers or transformers.

    Raises:
        UserError: (MODEL) as weight_sets.
    """
    found = chosen_set(folder)
    if found is None or found.name != stem:
        return False
    if found.index is not None:
        return found.index.name == f"{stem}.safetensors.index.json"
    index = folder / f"{stem}.safetensors.index.json"  # from_pretrained prefers it even where its files are missing
    return [file.name for file in found.files] == [f"{stem}.safetensors"] and not index.is_file()


def weight_files(path: Path) -> list[Path]:
    """List the files of a model's weights: the path itself, or the files in the folder. Raises UserError (MODEL)."""
    if path.is_file():
        if path.suffix == ".gguf":
            what, hint = "is a GGUF file, whose weights are quantized", "pass the bf16 or fp16 weights as .safetensors"
            raise UserError(str(path), what, hint, MODEL)
        if path.suffix not in (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES):
            raise UserError(
                str(path), "is not a weights file", f"use .safetensors or {', '.join(TORCH_SUFFIXES)}", MODEL
            )
        return [path]
    found = chosen_set(path) if path.is_dir() else None
    if found is None:
        present = sorted(file.name for file in path.iterdir()) if path.is_dir() else ["no such file or folder"]
        what = f"contains no .safetensors weights (found: {', '.join(present[:8]) or 'nothing'})"
        raise UserError(str(path), what, "pass a folder with safetensors weights", MODEL)
    if found.missing:
        raise UserError(str(path), missing_files(found), "copy the model again", MODEL)
    return list(found.files)


def missing_files(found: WeightSet) -> str:
    """Return the words that name the missing files of a set, and where their names come from."""
    names = join_first(found.missing)
    verb = "is" if len(found.missing) == 1 else "are"
    if found.index is not None:
        return f"{found.index.name} names {names}, which {verb} missing"
    return f"has {len(found.files)} of {len(found.files) + len(found.missing)} shards, {names} {verb} missing"
