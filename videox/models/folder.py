"""Reads and checks model folders: configurations, file headers and yaml are validated before any weight is loaded."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from videox.errors import LOAD_ERRORS, MODEL, UserError, plural
from videox.models.config_files import download_again, read_json
from videox.models.config_values import number_fault
from videox.models.configured import Component
from videox.models.downloads import (
    check_component_files,
    check_links,
    check_weight_set,
    download_command,
    repository_of,
)
from videox.weights.lazy_tensor import read_header
from videox.weights.safetensors_io import WEIGHTS, write_index
from videox.weights.weight_files import (
    INDEX,
    SAFETENSORS_SUFFIXES,
    chosen_set,
    has_standard_names,
    weight_files,
)

CONFIG_NAMES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
WITHOUT_WEIGHTS = ("scheduler_config.json", "preprocessor_config.json")
DOWNLOAD_AGAIN = "download the model again"
ORIGINAL_MARKS = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
# Folders in the original releases of HunyuanVideo -> the same model in diffusers' layout.
HUNYUAN_MARKS = {
    "hunyuan-video-t2v-720p": "hunyuanvideo-community/HunyuanVideo",
    "hunyuan-video-i2v-720p": "hunyuanvideo-community/HunyuanVideo-I2V",
}
# Beginnings of the names of its classes, in diffusers and in Tencent's code.
HUNYUAN_15_CLASSES = ("HunyuanVideo15", "HunyuanVideo_1_5")
HUNYUAN_15_TENSORS = ("vision_in.", "cond_type_embed")  # beginnings of names that only its transformers have
HUNYUAN_15 = (
    "is HunyuanVideo-1.5, which has another transformer, VAE and text encoder than HunyuanVideo and is not supported"
)


def read_model_folder(
    folder: str, pipelines: Sequence[str], components: Sequence[str], with_weights: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the configuration of each component of a model in diffusers layout, and "" -> model_index.json.

    Args:
        folder: the model folder.
        pipelines: class names that model_index.json may contain.
        components: sub-folders that must exist and contain a configuration.
        with_weights: those of the components that must contain complete safetensors files.

    Raises:
        UserError: naming what is missing, what was found, and how to fix it.
    """
    root = Path(folder)
    flag = "--pretrained_model_name_or_path"
    if _is_hunyuan_15(root):
        raise UserError(flag, f"{folder} {HUNYUAN_15}", f"pass a {' or '.join(pipelines)} model", MODEL)
    if not root.is_dir():
        hint = "pass a model folder, or an id of the Hub"
        if repository_of(root):
            hint = f"download it with `{download_command(root)}`, or {hint}"
        raise UserError(flag, f"{folder} is not a local folder", hint, MODEL)
    check_links(root)
    if not (root / "model_index.json").is_file():
        raise UserError(flag, *_other_folder(root, pipelines), MODEL)
    index = read_json(root / "model_index.json")
    if index.get("_class_name") not in pipelines:
        hint = f"pass a {' or '.join(pipelines)} model"
        kind = str(index.get("_class_name"))[:60]
        raise UserError(flag, f"{folder} is a {kind} model", hint, MODEL)
    configs: dict[str, dict[str, Any]] = {"": index}
    for name in components:
        configs[name] = read_component(root / name, name in with_weights)
    return configs


def _other_folder(root: Path, pipelines: Sequence[str]) -> tuple[str, str]:
    """Return what a folder without model_index.json is, and the hint."""
    found = f"(found: {_list_names(root)})"
    hint = f"pass a {' or '.join(pipelines)} model in diffusers layout"
    if any((root / name).exists() for name in ORIGINAL_MARKS):
        layout = "Wan2.1 in the original layout"
    elif original := [name for name in HUNYUAN_MARKS if (root / name).is_dir()]:
        copy = f"`hf download {HUNYUAN_MARKS[original[0]]} --local-dir {shlex.quote(f'{root}-diffusers')}`"
        return f"{root} is HunyuanVideo in the original layout {found}", f"use diffusers' layout of it: {copy}"
    elif inside := [path for path in sorted(root.iterdir()) if (path / "model_index.json").is_file()]:
        return f"{root} is a folder with models in it {found}", f"pass {' or '.join(map(str, inside[:3]))}"
    elif (root / "transformer" / "config.json").is_file() and not (root / "vae").exists():
        what = f"{root} contains trained weights, and no whole model {found}"
        return what, f"pass the model that was trained, with --transformer_path={root / 'transformer'}"
    elif (root.parent / "model_index.json").is_file():
        return f"{root} is one component of a model {found}", f"pass {root.parent}"
    else:
        layout = "without model_index.json"
        if (repository := repository_of(root)) and root.is_dir():
            hint = f"complete the download of {repository} with `{download_command(root)}`, or {hint}"
    if "WanPipeline" in pipelines:
        hint += f", or Wan2.1 in the original layout with {' and '.join(ORIGINAL_MARKS)}"
    return f"{root} is {layout} {found}", hint


def _is_hunyuan_15(root: Path) -> bool:
    """Return whether a folder is HunyuanVideo-1.5, whole or its transformer, in diffusers' or Tencent's layout."""
    for path in (root / "model_index.json", root / "config.json", *sorted(root.glob("transformer/*/config.json"))):
        try:
            name = str(json.loads(path.read_bytes()).get("_class_name"))
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # reading the model reports what is wrong with it
        if name.startswith(HUNYUAN_15_CLASSES):
            return True
    return False


def read_component(folder: Path, check_weights: bool) -> dict[str, Any]:
    """Return the configuration of one component.

    Args:
        folder: the component's folder.
        check_weights: also check that its safetensors files are complete.

    Raises:
        UserError: as read_model_folder.
    """
    check_links(folder)
    config = next((folder / name for name in CONFIG_NAMES if (folder / name).is_file()), None)
    if config is None:
        what = f"has no {' or '.join(CONFIG_NAMES)} (found: {_list_names(folder)})"
        if not folder.exists():
            what = f"does not exist (found in its parent folder: {_list_names(folder.parent)})"
        hint = f"complete the model folder with `{download_command(folder)}`"
        raise UserError(str(folder), what, hint, MODEL)
    check_component_files(folder)
    if check_weights:
        check_weight_set(folder)
    content = read_json(config)
    if config.name == CONFIG_NAMES[0] and (fault := number_fault(content)):
        raise UserError(str(config), fault, download_again(folder), MODEL)
    return content


def _list_names(folder: Path, limit: int = 8) -> str:
    """Return the first names in a folder, and how many more there are."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "nothing"


@contextmanager
def usual_names(folder: Path, stem: str) -> Iterator[Path]:
    """Yield a folder in which from_pretrained finds the weights: the folder itself if their names are the usual ones.

    Otherwise it is a temporary folder with links to the files, under the usual names and with an index.

    Args:
        folder: the component's folder.
        stem: the usual name of the library that loads it, without suffix.

    Raises:
        UserError: (MODEL) the folder's weights are incomplete.
    """
    if not folder.is_dir() or chosen_set(folder) is None or has_standard_names(folder, stem):
        yield folder
        return
    files = weight_files(folder)
    with TemporaryDirectory(prefix="videox-") as name:
        temporary = Path(name)
        for path in folder.iterdir():
            if path.suffix not in SAFETENSORS_SUFFIXES and not INDEX.fullmatch(path.name):
                (temporary / path.name).symlink_to(path.resolve())
        weight_map: dict[str, str] = {}
        for number, path in enumerate(files, 1):
            shard = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else f"{stem}.safetensors"
            (temporary / shard).symlink_to(path.resolve())
            weight_map |= dict.fromkeys(read_header(path)[0], shard)
        if len(files) > 1:
            write_index(temporary, stem, weight_map, sum(path.stat().st_size for path in files))
        yield temporary


def load_strictly(model_class: Any, folder: Path, **settings: Any) -> torch.nn.Module:  # noqa: ANN401 - diffusers' own keywords
    """Return model_class.from_pretrained(folder); raises if a weight is missing, instead of initializing it randomly.

    Args:
        model_class: a class of diffusers or transformers.
        folder: the component's folder.
        settings: keyword arguments of from_pretrained.

    Raises:
        UserError: weights are missing, unexpected, or differ in shape from the configuration.
    """
    stem = WEIGHTS if hasattr(model_class, "load_config") else "model"  # of diffusers; of transformers
    with usual_names(folder, stem) as named, convert_load_errors(model_class, folder):
        model, report = model_class.from_pretrained(named, output_loading_info=True, local_files_only=True, **settings)
    check_keys(
        model_class,
        folder,
        **{kind: list(report.get(f"{kind}_keys") or []) for kind in ("missing", "unexpected", "mismatched")},
    )
    return model


def load_pipeline(pipeline_class: Any, root: Path, parts: dict[str, Any]) -> Any:  # noqa: ANN401 - of diffusers
    """Return a pipeline of diffusers without a transformer, with these parts; the others are read from the folder.

    Args:
        pipeline_class: of diffusers.
        root: the model's folder.
        parts: loaded ones, by their names in model_index.json.

    Raises:
        UserError: (MODEL) a part cannot be read; it is named.
    """
    index, loaded = root / "model_index.json", dict(parts)
    for name, entry in read_json(index).items():
        # Parts without weights are loaded here, because diffusers' errors do not say which part they are of.
        if name in loaded or not any((root / name / config).is_file() for config in WITHOUT_WEIGHTS):
            continue
        with convert_load_errors(pipeline_class, index):
            part_class = load_class(".".join(entry))
        with convert_load_errors(part_class, root / name):
            loaded[name] = part_class.from_pretrained(root / name, local_files_only=True)
    with convert_load_errors(pipeline_class, index):
        return pipeline_class.from_pretrained(root, transformer=None, local_files_only=True, **loaded)


@contextmanager
def convert_load_errors(model_class: Any, folder: Path) -> Iterator[None]:  # noqa: ANN401 - of diffusers or transformers
    """Convert the errors that the libraries raise for mismatched weights or configurations into a UserError."""
    try:
        yield
    except (SafetensorError, StrictDataclassError, *LOAD_ERRORS) as error:
        cause = " ".join(str(error).split())
        what = f"does not load as {model_class.__name__} ({cause[:300]})"
        raise UserError(str(folder), what, DOWNLOAD_AGAIN, MODEL) from error


def check_keys(model_class: Any, folder: Path, **unmatched: Sequence[Any]) -> None:  # noqa: ANN401 - as above
    """Raise UserError if weights are missing, unexpected or mismatched in shape.

    Args:
        model_class: the class that loads the weights.
        folder: the folder of the weights.
        unmatched: the tensors' names by kind: missing, unexpected, mismatched.

    Raises:
        UserError: with the count and the first name.
    """
    for kind, names in unmatched.items():
        if names:
            what = f"has {len(names)} {kind} {plural(len(names), 'key')} for {model_class.__name__}, first {names[0]}"
            raise UserError(str(folder), what, "use the weights that belong to its config.json", MODEL)


def load_class(name: str) -> Any:  # noqa: ANN401 - of either library
    """Return the class of a dotted name, such as "diffusers.AutoencoderKLWan"; its library is loaded."""
    package, _, class_name = name.rpartition(".")
    return getattr(importlib.import_module(package), class_name)


def build_on_meta(model_class: Any, config: dict[str, Any]) -> torch.nn.Module:  # noqa: ANN401 - of either library
    """Return the model that a configuration describes, with all tensors on the meta device.

    Args:
        model_class: a class of diffusers or transformers.
        config: the configuration, with the class's own keys.

    Raises:
        UserError: the class cannot be built from the configuration.
    """
    try:
        with torch.device("meta"):
            if hasattr(model_class, "load_config"):
                return model_class.from_config(config)
            return model_class(model_class.config_class.from_dict(config))
    except (StrictDataclassError, *LOAD_ERRORS) as error:
        what = f"is not a configuration of {model_class.__name__} ({' '.join(str(error).split())[:300]})"
        raise UserError("config.json", what, DOWNLOAD_AGAIN, MODEL) from error


def build_config(config_class: Any, component: Component) -> Any:  # noqa: ANN401 - of transformers
    """Return the configuration of a component as an object of its class, with defaults for keys that it leaves out.

    Args:
        config_class: of transformers.
        component: whose configuration is read.

    Raises:
        UserError: (MODEL) the class refuses it.
    """
    with convert_load_errors(config_class, component.path):
        return config_class(**component.config)


def full_config(model_class: Any, config: dict[str, Any]) -> Any:  # noqa: ANN401 - diffusers' own class and configuration
    """Return a diffusers model's configuration with defaults for the keys that it leaves out; loads no weight.

    Raises:
        UserError: the class cannot be built from the configuration.
    """
    return build_on_meta(model_class, config).config


def check_finite(model: torch.nn.Module, folder: Path) -> None:
    """Raise UserError naming the first tensor of the model that has a value that is not finite."""
    for name, tensor in model.state_dict().items():
        if has_nonfinite(tensor):
            raise nonfinite_error(name, folder)


def has_nonfinite(tensor: torch.Tensor) -> bool:
    """Return whether a value is infinite or NaN; uses the extremes, which need no memory beside the tensor."""
    return bool(tensor.numel()) and not all(torch.isfinite(extreme).item() for extreme in torch.aminmax(tensor))


def nonfinite_error(name: str, folder: Path) -> UserError:
    """Return the UserError for a tensor that has a value that is not finite."""
    return UserError(str(folder), f"{name} contains values that are not finite", DOWNLOAD_AGAIN, MODEL)
