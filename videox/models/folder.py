"""Serves whoever gives a model folder: it is read and checked whole, in a second, before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from yaml import YAMLError

from videox.errors import UNLOADABLE, MODEL, UserError

CONFIG_NAMES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
# What the libraries raise over weights that do not fit, and over a configuration with values of the wrong kind.
# OmegaConf passes on what the yaml parser raises, and asserts that the document is more than a bare number.
BAD_YAML = (
    OSError, ValueError, AttributeError, TypeError, RecursionError, AssertionError, YAMLError, OmegaConfBaseException,
)  # fmt: skip
ORIGINAL_MARKS = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")


def read_model_folder(
    folder: str, pipelines: Sequence[str], components: Sequence[str], weighted: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns the configuration of each component of a model in diffusers layout, and "" -> model_index.json.

    Args:
        folder: of the model.
        pipelines: class names that model_index.json may name.
        components: sub-folders that must be there with a configuration.
        weighted: those of them that must hold whole safetensors files.

    Raises:
        UserError: naming what is missing, what is there, and the way out.
    """
    root = Path(folder)
    flag = "--pretrained_model_name_or_path"
    if not root.is_dir():
        raise UserError(flag, f"{folder} is not a folder here", "give the folder of a model in diffusers layout", MODEL)
    if not (root / "model_index.json").is_file():
        original = any((root / name).exists() for name in ORIGINAL_MARKS)
        layout = "Wan2.1 in the original layout" if original else "without model_index.json"
        hint = f"give a model of {' or '.join(pipelines)} in diffusers layout"
        if "WanPipeline" in pipelines:
            hint += f", or Wan2.1 in its original one with {' and '.join(ORIGINAL_MARKS)}"
        raise UserError(flag, f"{folder} is {layout} (found: {_few_names(root)})", hint, MODEL)
    index = read_json(root / "model_index.json")
    if index.get("_class_name") not in pipelines:
        hint = f"give a model of {' or '.join(pipelines)}"
        raise UserError(flag, f"{folder} is a {index.get('_class_name')} model", hint, MODEL)
    configs: dict[str, dict[str, Any]] = {"": index}
    for name in components:
        configs[name] = read_component(root / name, name in weighted)
    return configs


def read_component(folder: Path, weighted: bool) -> dict[str, Any]:
    """Returns the configuration of one component; with `weighted`, its safetensors files are checked to be whole.

    Raises:
        UserError: as read_model_folder.
    """
    config = next((folder / name for name in CONFIG_NAMES if (folder / name).is_file()), None)
    if config is None:
        what = f"has no {' or '.join(CONFIG_NAMES)} (found: {_few_names(folder)})"
        if not folder.exists():
            what = f"does not exist (beside it: {_few_names(folder.parent)})"
        raise UserError(str(folder), what, "complete the model folder", MODEL)
    if weighted:
        check_weight_files(folder)
    return read_json(config)


def _few_names(folder: Path, most: int = 8) -> str:
    """Returns the first names in a folder, and how many more there are."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object; raises UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as why:
        raise UserError(str(path), f"cannot be read as JSON ({why})", "copy the model anew", MODEL) from why
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a JSON object", "copy the model anew", MODEL)
    return content


def read_number(config: dict[str, Any], name: str, where: str) -> float:
    """Returns a number of a component's configuration; raises UserError where there is none."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(where, f"its configuration has {name} = {value!r}", "copy the model anew", MODEL)
    return float(value)


def check_weight_files(folder: Path) -> None:
    """Opens the header of each safetensors file of a component; an index must name only files that are there.

    Raises:
        UserError: no weights, a missing shard, or a file that is cut short or damaged in its header.
    """
    hint = "copy the model anew"
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    for index in indices:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(str(index), "has no weight_map from tensors to files", hint, MODEL)
        for name in sorted(set(weight_map.values())):
            if not (folder / name).is_file():
                count = sum(1 for value in weight_map.values() if value == name)
                raise UserError(str(folder / name), f"is missing, with {count} tensors", hint, MODEL)
    if not files:
        raise UserError(str(folder), "holds no .safetensors weights", "give safetensors weights", MODEL)
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as why:
            raise UserError(str(path), f"is cut short or damaged ({why})", hint, MODEL) from why


def load_strictly(model_class: Any, folder: Path, **settings: Any) -> torch.nn.Module:  # noqa: ANN401 - diffusers' own keywords
    """Returns model_class.from_pretrained(folder) when every weight found its place; random leftovers are refused.

    Args:
        model_class: of diffusers or transformers.
        settings: keywords of from_pretrained.

    Raises:
        UserError: weights are missing, extra, or of another shape than the configuration says.
    """
    with unloadable_refused(model_class, folder):
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **settings
        )
    refuse_unmatched(
        model_class,
        folder,
        **{kind: list(report.get(f"{kind}_keys") or []) for kind in ("missing", "unexpected", "mismatched")},
    )
    return model


@contextmanager
def unloadable_refused(model_class: Any, folder: Path) -> Iterator[None]:  # noqa: ANN401 - of diffusers or transformers
    """Turns whatever the libraries raise over a folder that does not fit its configuration into a UserError."""
    try:
        yield
    except (SafetensorError, StrictDataclassError, *UNLOADABLE) as why:
        cause = " ".join(str(why).split())
        raise UserError(
            str(folder), f"does not load as {model_class.__name__} ({cause[:300]})", "copy the model anew", MODEL
        ) from why


def refuse_unmatched(model_class: Any, folder: Path, **unmatched: Sequence[Any]) -> None:  # noqa: ANN401 - as above
    """Refuses weights that are missing, unexpected or mismatched in shape.

    Args:
        unmatched: the tensors' names by kind.

    Raises:
        UserError: naming the first.
    """
    for kind, names in unmatched.items():
        if names:
            what = f"has {len(names)} {kind} keys for {model_class.__name__}, first {names[0]}"
            raise UserError(str(folder), what, "give the weights that belong to its config.json", MODEL)


def without_weights(model_class: Any, config: dict[str, Any]) -> torch.nn.Module:  # noqa: ANN401 - of either library
    """Returns the model that a configuration describes, its tensors without data.

    Args:
        model_class: of diffusers or transformers.
        config: in its words.

    Raises:
        UserError: the class cannot be made by it.
    """
    try:
        with torch.device("meta"):
            if hasattr(model_class, "load_config"):
                return model_class.from_config(config)
            return model_class(model_class.config_class.from_dict(config))
    except (StrictDataclassError, *UNLOADABLE) as why:
        what = f"is no configuration of {model_class.__name__} ({' '.join(str(why).split())[:300]})"
        raise UserError("config.json", what, "copy the model anew", MODEL) from why


def full_config(model_class: Any, config: dict[str, Any]) -> Any:  # noqa: ANN401 - diffusers' own class and configuration
    """Returns a model's configuration with the defaults of what it leaves out; loads no weight.

    Raises:
        UserError: the class cannot be made by it.
    """
    try:
        with torch.device("meta"):
            return model_class.from_config(config).config
    except UNLOADABLE as why:
        what = f"is no configuration of {model_class.__name__} ({' '.join(str(why).split())[:300]})"
        raise UserError("config.json", what, "copy the model anew", MODEL) from why


def check_tokenizer(tokenizer: Any, folder: Path, probe: str) -> None:  # noqa: ANN401 - of transformers
    """Checks that a tokenizer splits text as its own tokenizer.json says.

    The class that a model folder names may rebuild the tokenizer from its vocabulary by other rules (spaces and line
    breaks then vanish without a word), so that prompts mean something else than at inference.

    Args:
        tokenizer: as the pipeline uses it.
        folder: that it was loaded from; one without tokenizer.json is not checked.
        probe: text with whatever the family's prompts may hold.

    Raises:
        UserError: it splits the probe otherwise.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted.no_padding()
    wanted.no_truncation()
    found = tokenizer(probe).input_ids
    if found != wanted.encode(probe).ids:
        what = f"is loaded as {type(tokenizer).__name__}, which splits text otherwise than its tokenizer.json"
        raise UserError(str(folder), what, "name the class that its tokenizer_config.json was saved with", MODEL)


def refuse_not_finite(model: torch.nn.Module, folder: Path) -> None:
    """Raises UserError naming the first tensor with a value that is not finite."""
    for name, tensor in model.state_dict().items():
        if has_not_finite(tensor):
            raise not_finite(name, folder)


def has_not_finite(tensor: torch.Tensor) -> bool:
    """Returns whether a value is infinite or no number: the extremes tell, which need no memory beside the tensor."""
    return bool(tensor.numel()) and not all(torch.isfinite(extreme).item() for extreme in torch.aminmax(tensor))


def not_finite(name: str, folder: Path) -> UserError:
    """Returns the UserError of a tensor with such a value."""
    return UserError(str(folder), f"{name} holds values that are not finite", "copy the model anew", MODEL)


def read_yaml(config_path: str) -> DictConfig:
    """Returns the yaml; it may hold no interpolation, which could read the environment. Raises UserError."""
    needed = "it needs scheduler_kwargs.shift, 5.0 for Wan2.1"
    try:
        text = Path(config_path).read_text(encoding="utf-8")
        if "${" in text:
            raise UserError("--config_path", f"{config_path} holds an interpolation", "write the values out")
        found = OmegaConf.create(text)
    except BAD_YAML as why:
        raise UserError("--config_path", f"{config_path}: {' '.join(str(why).split())}", needed) from why
    if not isinstance(found, DictConfig):
        raise UserError("--config_path", f"{config_path} holds no names with values", needed)
    return found


def read_shift(config_path: str) -> float:
    """Returns the flow shift from the yaml. Raises UserError."""
    try:
        shift = float(read_yaml(config_path).scheduler_kwargs.shift)
    except BAD_YAML as why:
        cause = " ".join(str(why).split())
        raise UserError(
            "--config_path", f"{config_path}: {cause}", "it needs scheduler_kwargs.shift, 5.0 for Wan2.1"
        ) from why
    if not 0 < shift < 1000:
        raise UserError("--config_path", f"scheduler_kwargs.shift is {shift}", "Wan2.1 has 5.0")
    return shift
