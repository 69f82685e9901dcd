"""Detects unfinished and damaged downloads in a model folder, and names the command that completes them.

Nothing is downloaded and no weight is read: sizes, headers and names are compared.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from videox.errors import MODEL, UserError, plural
from videox.weights.expert_names import EXPERTS
from videox.weights.file_damage import describe_damage, describe_pointer
from videox.weights.safetensors_io import join_first
from videox.weights.weight_files import SAFETENSORS_SUFFIXES, TORCH_SUFFIXES, WeightSet, chosen_set, missing_files

# Files that download programs write next to an unfinished file: Hub, aria2, browsers and curl, Chrome.
UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload")
HUB_CACHE = re.compile(r"models--(.+?)--(.+)")  # the name of a model's folder in the Hub's cache
UNKNOWN_REPOSITORY = "ORGANIZATION/MODEL"
# Published models by the name of their folder, in lower case: (original layout, diffusers layout).
PUBLISHED: Mapping[str, tuple[str, str]] = {
    **{
        f"wan2.1-{name}".lower(): (f"Wan-AI/Wan2.1-{name}", f"Wan-AI/Wan2.1-{name}-Diffusers")
        for name in ("T2V-14B", "T2V-1.3B", "I2V-14B-480P", "I2V-14B-720P")
    },
    "wan2.1-flf2v-14b-720p": ("Wan-AI/Wan2.1-FLF2V-14B-720P", "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"),
    **{
        f"wan2.1-fun-{name}".lower(): (f"alibaba-pai/Wan2.1-Fun-{name}",) * 2
        for name in ("1.3B-InP", "14B-InP", "V1.1-1.3B-InP", "V1.1-14B-InP")
    },
    **{
        f"wan2.2-{name}".lower(): (f"Wan-AI/Wan2.2-{name}", f"Wan-AI/Wan2.2-{name}-Diffusers")
        for name in ("T2V-A14B", "I2V-A14B")
    },
    **{
        name.lower(): (f"hunyuanvideo-community/{name}",) * 2
        for name in ("HunyuanVideo", "HunyuanVideo-I2V", "HunyuanVideo-I2V-33ch")
    },
}


def check_component_files(folder: Path) -> None:
    """Check that no file of a component's folder is a git-lfs pointer, a link to nothing, or still being downloaded.

    Raises:
        UserError: (MODEL) with the command that completes the download.
    """
    check_links(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in UNFINISHED and (folder / path.stem).exists():
            what = f"is unfinished: {path.name} is next to it, which its download removes at the end"
            raise UserError(str(folder / path.stem), what, download_hint(folder), MODEL)
        check_pointer(path)


def check_links(folder: Path) -> None:
    """Raise UserError (MODEL) if a file of a folder is a link to a file that does not exist.

    A snapshot in the Hub's cache consists of links to the files in blobs/.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() and not path.exists():
            what = f"is a link to {path.readlink()}, which does not exist"
            hint = f"copy the folder with the files that its links name (cp -rL), or {download_hint(folder)}"
            raise UserError(str(path), what, hint, MODEL)


def check_pointer(path: Path) -> None:
    """Raise UserError (MODEL) for a git-lfs pointer: a text file of the size and hash of the file that is meant."""
    try:
        what = describe_pointer(path)
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error})", download_hint(path.parent), MODEL) from error
    if what:
        raise UserError(str(path), what, f"run `git lfs pull` in its folder, or {download_hint(path.parent)}", MODEL)


def check_weight_set(folder: Path) -> None:
    """Check that a folder's weights are complete: all shards exist, and each has the size that its header states.

    Raises:
        UserError: (MODEL) no weights, a missing shard, or a file that is truncated or damaged in its header; with the
            command that downloads the model, if it is known.
    """
    found = chosen_set(folder)
    if found is None:
        names = sorted(path.name for path in folder.iterdir())
        what = f"contains no .safetensors weights (found: {join_first(names) or 'nothing'}){_unfinished_note(folder)}"
        raise UserError(str(folder), what, f"pass safetensors weights, or {download_hint(folder)}", MODEL)
    if found.missing:
        where, what = _missing(folder, found)
        raise UserError(where, f"{what}{_unfinished_note(folder)}", download_hint(folder), MODEL)
    for path in found.files:
        check_weights_file(path)


def _missing(folder: Path, found: WeightSet) -> tuple[str, str]:
    if found.index is None:
        return str(folder), missing_files(found)
    names = json.loads(found.index.read_bytes())["weight_map"].values()
    count = sum(1 for name in names if name == found.missing[0])
    more = f", and so are {len(found.missing) - 1} more shards" if len(found.missing) > 1 else ""
    return str(folder / found.missing[0]), f"is missing, with {count} {plural(count, 'tensor')}{more}"


def check_weights_file(path: Path) -> None:
    """Check that a file is safetensors and as long as its header states, or a complete file of torch.save.

    Raises:
        UserError: (MODEL) naming the sizes, or what the file is instead.
    """
    check_pointer(path)
    if path.suffix in TORCH_SUFFIXES and not zipfile.is_zipfile(path):
        what = "is not a torch.save file, or was saved before torch 1.6, or is truncated"
        hint = f"{download_hint(path.parent)}, or save its tensors as safetensors"
        raise UserError(str(path), what, hint, MODEL)
    if path.suffix not in SAFETENSORS_SUFFIXES:
        return
    hint = download_hint(path.parent)
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        cause = str(error)
    raise UserError(str(path), describe_damage(path, cause), hint, MODEL)


def _unfinished_note(folder: Path) -> str:
    """Return the words on unfinished downloads of a folder's files; "" if there are none."""
    found = list(_unfinished(folder))
    if not found:
        return ""
    count = "an unfinished download is" if len(found) == 1 else f"{len(found)} unfinished downloads are"
    return f"; {count} in {found[0].parent}"


def _unfinished(folder: Path) -> Iterator[Path]:
    """Yield the unfinished downloads of a folder's files.

    The Hub's client keeps them in .cache/huggingface/download of the folder that it downloads to (with the same
    subfolder), or in blobs/ of its cache.
    """
    download = Path(".cache/huggingface/download")
    places = [folder, folder / download, folder.parent / download / folder.name]
    places += [parent / "blobs" for parent in folder.parents if HUB_CACHE.fullmatch(parent.name)]
    for place in places:
        if place.is_dir():
            yield from sorted(path for path in place.iterdir() if path.suffix in UNFINISHED)


# ---------------------------------------------------------------------------------------------- where it comes from


def download_hint(folder: Path) -> str:
    """Return the hint to complete a download, with the command for the model that a folder belongs to."""
    return f"complete the download with `{download_command(folder)}`"


def download_command(folder: Path) -> str:
    """Return the command that downloads the model that a folder belongs to; files that are complete stay.

    Args:
        folder: the model's folder, or a folder inside it.
    """
    root = model_root(folder)
    repository = repository_of(root) or UNKNOWN_REPOSITORY
    cached = next((path for path in (root, *root.parents) if HUB_CACHE.fullmatch(path.name)), None)
    if cached is None:
        return f"hf download {repository} --local-dir {shlex.quote(str(root))}"
    is_default = cached.parent.resolve() == Path(constants.HF_HUB_CACHE).resolve()
    return f"hf download {repository}" + ("" if is_default else f" --cache-dir {shlex.quote(str(cached.parent))}")


def model_root(folder: Path) -> Path:
    """Return the folder of the model that a folder belongs to: itself, or the one with model_index.json above it.

    In the original layout of Wan2.2 it is the one above the folder of an expert.
    """
    is_index_above = not (folder / "model_index.json").is_file() and (folder.parent / "model_index.json").is_file()
    if is_index_above or folder.name in {f"{expert}_model" for expert in EXPERTS}:
        return folder.parent
    return folder


def repository_of(root: Path) -> str | None:
    """Return the Hub id of the model in a folder, None if nothing shows it.

    It is taken from the folder's place in the Hub's cache, from its git repository, from its name, or from the sizes
    and kind in its configuration.
    """
    for folder in (root, *root.parents):
        if match := HUB_CACHE.fullmatch(folder.name):
            return f"{match[1]}/{match[2]}"
    return _cloned_from(root) or _published_by_name(root) or _published_by_config(root)


def _cloned_from(root: Path) -> str | None:
    config = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        config.read(root / ".git/config", encoding="utf-8")
        url = config.get('remote "origin"', "url", fallback="")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return None
    match = re.search(r"(?:huggingface\.co|hf\.co|hf-mirror\.com)[/:](?:models/)?([\w.-]+/[\w.-]+?)(?:\.git)?/?$", url)
    return match[1] if match else None


def _published_by_name(root: Path) -> str | None:
    name = root.resolve().name.lower().removesuffix("-diffusers").replace("___", ".")  # ModelScope writes 2___1
    if name not in PUBLISHED:
        return None
    return PUBLISHED[name][_is_diffusers(root)]


def _is_diffusers(root: Path) -> bool:
    return (root / "model_index.json").is_file() or root.name.lower().endswith("-diffusers")


def _published_by_config(root: Path) -> str | None:
    places = (root / "transformer", root, *(root / f"{expert}_model" for expert in EXPERTS))
    config = next((c for c in map(_config, places) if c), {})
    name = config.get("_class_name")
    if name in ("WanTransformer3DModel", "WanModel"):
        width = config.get("dim") or _product(config.get("num_attention_heads"), config.get("attention_head_dim"))
        channels = config.get("in_dim", config.get("in_channels"))
        sizes = {"1536 16": "wan2.1-t2v-1.3b", "5120 16": "wan2.1-t2v-14b", "5120 36": "wan2.1-i2v-14b-480p"}
        if _has_two_experts(root):
            sizes = {"5120 16": "wan2.2-t2v-a14b", "5120 36": "wan2.2-i2v-a14b"}
        size = sizes.get(f"{width} {channels}")
        return PUBLISHED[size][_is_diffusers(root)] if size else None
    if name == "HunyuanVideoTransformer3DModel":
        kinds = {"None": "hunyuanvideo", "token_replace": "hunyuanvideo-i2v", "latent_concat": "hunyuanvideo-i2v-33ch"}
        found = kinds.get(str(config.get("image_condition_type")))
        return PUBLISHED[found][1] if found else None
    return None


def _has_two_experts(root: Path) -> bool:
    """Return whether a folder is a Wan2.2 of two experts, whose transformers are those of Wan2.1 by their sizes."""
    experts = [root / f"{expert}_model" for expert in EXPERTS]
    return _config(root, "model_index.json").get("boundary_ratio") is not None or any(map(Path.is_dir, experts))


def _product(first: Any, second: Any) -> int | None:  # noqa: ANN401 - of a configuration that may hold anything
    return first * second if isinstance(first, int) and isinstance(second, int) else None


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
