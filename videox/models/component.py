"""Model components: identified by the tensor names in their files, loaded with every weight or rejected."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from omegaconf import DictConfig, OmegaConf

from videox.errors import LOAD_ERRORS, MODEL, UserError
from videox.lora.reader import lora_file
from videox.models import infer_config
from videox.models.config_files import read_json, read_yaml
from videox.models.config_values import value_fault
from videox.models.configured import Component
from videox.models.downloads import check_weight_set, check_weights_file
from videox.models.folder import (
    CONFIG_NAMES,
    DOWNLOAD_AGAIN,
    HUNYUAN_15,
    HUNYUAN_15_CLASSES,
    HUNYUAN_15_TENSORS,
    check_finite,
    load_strictly,
    read_component,
    read_model_folder,
)
from videox.models.hub import snapshot_folder
from videox.weights.header import header_config
from videox.weights.layouts import family_of
from videox.weights.reader import LayoutTensors, open_tensors
from videox.weights.safetensors_io import join_first
from videox.weights.weight_files import chosen_set, has_standard_names

# The diffusers class of each kind of component that a flag can point to.
CLASS_NAMES = {
    "wan": "WanTransformer3DModel", "hunyuan": "HunyuanVideoTransformer3DModel",
    "wan_vae": "AutoencoderKLWan", "hunyuan_vae": "AutoencoderKLHunyuanVideo",
}  # fmt: skip
ALIGNED = 64  # bytes: the alignment of memory that torch allocates


def find_component(
    path: Path, kind: str, known: Mapping[str, Any] | None = None, *, check_weights: bool = True
) -> Component:
    """Return a component in any supported layout, identified by its tensors' names and not by its file name.

    Args:
        path: a folder with config.json and weights, in diffusers' or the original layout, or a single weight file. A
            folder with weights alone is read as one file if there is a known configuration.
        kind: a layout of videox.weights.layouts.TABLES, or the kind of a component that has diffusers' names
            everywhere.
        known: the closest known configuration, for values that neither a single file's weights nor its header define,
            and for the number of blocks of a transformer, where its own configuration does not define it.
        check_weights: False trusts a folder's config.json and does not open its weight files; a single file is always
            opened.

    Raises:
        UserError: (MODEL) the path does not exist, the weights are of another kind, a file is damaged, or the
            configuration contradicts the weights, or blocks of a transformer are missing or left over.
    """
    is_folder = not path.is_file() and not (known and is_bare(path))
    if not is_folder:
        check_weight_set(path) if path.is_dir() else check_weights_file(path)
    if lora_file(path) is not None:
        what, hint = "is a LoRA, which contains adapters only", "start from it with --init_lora_from"
        raise UserError(str(path), what, f"{hint}, or merge it into its base model with scripts/export.py", MODEL)
    own = read_component(path, check_weights=check_weights) if is_folder else header_config(path)
    check_class(path, kind, own)
    check_values(path, kind, own)
    if own and not check_weights and is_folder:
        return Component(path, own)
    tensors = open_tensors(path)
    if kind == "hunyuan" and any(name.startswith(HUNYUAN_15_TENSORS) for name in tensors):
        raise UserError(str(path), HUNYUAN_15, f"pass weights of {CLASS_NAMES[kind]}", MODEL)
    if tensors.layout is None and is_folder:
        check_depth(tensors, kind, own)
        # Weights under other file names are read here: from_pretrained would not find them.
        return Component(path, own, None if has_standard_names(path) or kind not in CLASS_NAMES else tensors)
    known = {**(known or {}), **own}
    detected = tensors.layout or family_of(tensors)
    if detected not in (kind, None):
        what = f"contains weights of the kind {detected}, not {kind}"
        raise UserError(str(path), what, f"pass weights of the kind {kind}", MODEL)
    if detected is None:
        return Component(path, known, tensors)
    try:
        config = infer_config.CONFIGS[detected](tensors.shapes(), known)
    except KeyError as missing:
        name = str(missing.args[0])
        what = f"has no {tensors.name_in_file(name)}, which every model of the kind {detected} has"
        raise UserError(str(path), what, DOWNLOAD_AGAIN, MODEL) from missing
    except (ValueError, ZeroDivisionError, TypeError, IndexError) as error:
        what = f"has tensors of unexpected shapes ({error})"
        raise UserError(str(path), what, DOWNLOAD_AGAIN, MODEL) from error
    check_depth(tensors, detected, known)
    if tensors.layout == "wan" and (faults := infer_config.contradictions(config, own)):
        what = f"its config.json contradicts its weights: {join_first(faults)}"
        raise UserError(str(path), what, DOWNLOAD_AGAIN, MODEL)
    return Component(path, {**known, **config} if tensors.layout is None else config, tensors)


def is_bare(path: Path) -> bool:
    """Return whether a path is a folder with safetensors files and without the configuration of a component."""
    if not path.is_dir() or any((path / name).is_file() for name in CONFIG_NAMES):
        return False
    return chosen_set(path) is not None


def check_depth(tensors: LayoutTensors, kind: str, config: Mapping[str, Any]) -> None:
    """Check that the blocks of a transformer are numbered without a gap and are as many as its configuration defines.

    The weights alone do not show that the last blocks are missing: the file is that of a shallower model.

    Args:
        tensors: the tensors of the weights.
        kind: the layout that they belong to.
        config: the configuration that defines the number of blocks. Without it, the published model of the same width
            defines it, and where there is none, only gaps are detected.

    Raises:
        UserError: (MODEL) naming the first block that is missing or left over, as in the file.
    """
    width, depths = infer_config.published_depths(kind, tensors.shapes())
    for key, tensor in infer_config.BLOCK_TENSORS.get(kind, {}).items():
        present = infer_config.module_numbers(tensors.shapes(), tensor.partition(".#.")[0])
        defined, source = config.get(key), "the model's configuration"
        if defined is None:
            defined, source = depths.get(key), f"the published model of width {width}"
        count = defined if isinstance(defined, int) else 1 + max(present, default=-1)
        expected = set(range(count))
        if present == expected:
            continue
        first = min(expected - present or present - expected)
        # The name in the file up to the block's number, which is the first number in it.
        block = re.sub(r"^(.*?\.\d+)\..*", r"\1", tensors.name_in_file(tensor.replace("#", str(first))))
        source = "" if defined is None else f" ({key} = {defined} in {source})"
        if present > expected:
            what = f"has {len(present)} blocks in place of {count}{source}, {block} is left over"
        else:
            what = f"has {len(present & expected)} of {count} blocks{source}, {block} is missing"
        hint = "pass the complete weights of one model, with a model folder of the same number of blocks"
        raise UserError(str(tensors.path), what, hint, MODEL)


def check_class(path: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Check that a folder's configuration does not name another diffusers class than that of the expected kind.

    A class name that diffusers does not have is ignored: the original layout and other trainers write names of their
    own.

    Raises:
        UserError: (MODEL) naming both classes.
    """
    found, expected = config.get("_class_name"), CLASS_NAMES.get(kind)
    if str(found).startswith(HUNYUAN_15_CLASSES):
        raise UserError(str(path), HUNYUAN_15, f"pass weights of {expected}", MODEL)
    if expected and found != expected and found in dir(diffusers):
        raise UserError(str(path), f"is {found}, not {expected}", f"pass weights of {expected}", MODEL)


def check_values(path: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Check the types of a configuration's values. Raises UserError (MODEL) naming the first that is wrong."""
    if "dim" in config:  # of Wan's original code, also as VideoX-Fun writes it: there qk_norm is true or false
        config = {key: value for key, value in config.items() if key != "qk_norm"}
    if kind in CLASS_NAMES and (fault := value_fault(getattr(diffusers, CLASS_NAMES[kind]), config)):
        place = path / "config.json" if path.is_dir() else path
        raise UserError(str(place), fault, DOWNLOAD_AGAIN, MODEL)


def choose_component(
    name: str,
    flag_value: str | None,
    default: Path,
    kind: str,
    known: Mapping[str, Any],
    *,
    check_weights: bool = True,
) -> Component:
    """Return the component that --<name>_path points to, or the model's own at its default path; see find_component.

    Args:
        name: the component's name in the flag.
        flag_value: the flag's value, None if it was not passed. Of a whole model in diffusers layout, its component of
            this name is used; of a model's folder in the Hub's cache, its snapshot.
        default: the component's path inside the model.
        kind: as for find_component.
        known: as for find_component.
        check_weights: as for find_component.

    Raises:
        UserError: (MODEL) the flag's path does not exist, or any error of find_component.
    """
    if not flag_value:
        return find_component(default, kind, known, check_weights=check_weights)
    if not Path(flag_value).exists():
        hint = "pass a folder or file of weights; only --pretrained_model_name_or_path accepts a Hugging Face Hub id"
        raise UserError(f"--{name}_path", f"{flag_value} does not exist", hint, MODEL)
    path = snapshot_folder(Path(flag_value), f"--{name}_path")
    if (path / "model_index.json").is_file():  # a whole model: its component is meant
        path = path / name
    return find_component(path, kind, known, check_weights=check_weights)


def diffusers_components(
    root: Path,
    pipelines: Sequence[str],
    names: Sequence[str],
    overrides: Mapping[str, tuple[str, str | None]],
    with_weights: Sequence[str],
) -> dict[str, Component]:
    """Return the components of a model folder in diffusers layout; no weights are loaded.

    Args:
        root: the model folder.
        pipelines: pipeline classes that its model_index.json may name.
        names: subfolders to read.
        overrides: component name -> (kind as in find_component, path given by the user or None), for the components
            that a flag can replace.
        with_weights: names whose weight files must be complete; if empty (a dry run), configurations alone are read.

    Raises:
        UserError: (MODEL) a component is missing or damaged, or a path does not hold such a component.
    """
    configs = read_model_folder(str(root), pipelines, names, with_weights)
    components = {name: Component(root / name, configs[name]) for name in names}
    for name, (kind, path) in overrides.items():
        components[name] = choose_component(
            name, path, root / name, kind, configs[name], check_weights=bool(with_weights)
        )
    return components


def load_component(model_class: Any, component: Component, dtype: torch.dtype | None) -> torch.nn.Module:  # noqa: ANN401 - of diffusers or transformers
    """Return the model with every weight loaded, in eval mode; at most one more tensor is in memory at a time.

    Args:
        model_class: a class of diffusers or transformers.
        component: the component to load.
        dtype: the dtype of the floating-point tensors; None keeps the stored dtype of each.

    Raises:
        UserError: (MODEL) weights are missing, unexpected, or differ in shape from the configuration; each is named.
    """
    from_diffusers = hasattr(model_class, "load_config")
    if component.tensors is None:
        return load_strictly(model_class, component.path, dtype=dtype)
    try:
        with init_empty_weights():
            if from_diffusers:
                model = model_class.from_config(component.config)
            else:
                model = model_class(model_class.config_class(**component.config))
    except LOAD_ERRORS as error:
        cause = " ".join(str(error).split())[:300]
        what = f"its configuration does not build a {model_class.__name__} ({cause})"
        raise UserError(str(component.path), what, "check the configuration", MODEL) from error
    expected = model.state_dict()
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        expected.pop(tied, None)
    ignored = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    check_shapes(component.tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()}, ignored)
    for name in expected:
        value = component.tensors[name]
        value = value.to(dtype) if value.is_floating_point() and dtype else value
        # A memory-mapped tensor may start at any byte, and CPU kernels sum unaligned memory in another order: without
        # the copy, results would differ from those of the same weights loaded by from_pretrained.
        if value.data_ptr() % ALIGNED:
            value = value.clone()
        set_module_tensor_to_device(model, name, "cpu", value=value, dtype=value.dtype)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def load_checked(
    model_class: Any,  # noqa: ANN401 - of diffusers
    component: Component,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """Return a model in a dtype, with every weight loaded and finite; raises UserError otherwise."""
    model = load_component(model_class, component, dtype)
    check_finite(model, component.path)
    return model


def check_shapes(tensors: LayoutTensors, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
    """Raise UserError (MODEL) naming missing, unexpected and wrongly shaped tensors by their names in the file.

    Args:
        tensors: the tensors to load.
        expected: the shapes of the model's tensors, by name.
        ignored: patterns of names that the model's class allows to be left over.
    """
    in_file = tensors.name_in_file
    faults = [f"{in_file(name)} is missing" for name in sorted(expected.keys() - tensors.keys())]
    unexpected = [
        name for name in sorted(tensors.keys() - expected.keys()) if not any(re.search(p, name) for p in ignored)
    ]
    faults += [f"{in_file(name)} is not in the model" for name in unexpected]
    faults += [
        f"{in_file(name)} is {list(tensors.shape(name))}, the model has {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors.shape(name) != shape
    ]
    if faults:
        raise UserError(str(tensors.path), join_first(faults), "pass the complete weights of a single model", MODEL)


# ------------------------------------------------------------------ Wan2.1's original folder, described by its yaml

# The yaml key that defines each component's path inside the model folder, and the path in the published folders.
ORIGINAL_PATHS = {
    "transformer": ("transformer_additional_kwargs.transformer_subpath", "./"),
    "vae": ("vae_kwargs.vae_subpath", "Wan2.1_VAE.pth"),
    "text_encoder": ("text_encoder_kwargs.text_encoder_subpath", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("text_encoder_kwargs.tokenizer_subpath", "google/umt5-xxl"),
    "image_encoder": (
        "image_encoder_kwargs.image_encoder_subpath",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ),
}
ORIGINAL_KINDS = {"transformer": "wan", "vae": "wan_vae", "text_encoder": "umt5"}


def original_paths(root: Path, config_path: str) -> dict[str, Path] | None:
    """Return the path of each component of a model in Wan's original layout, or None if the folder has another layout.

    Args:
        root: the model folder.
        config_path: the yaml that defines the components' paths.
    """
    if (root / "model_index.json").is_file():
        return None
    yaml: DictConfig = read_yaml(config_path)
    paths = {
        name: root / str(OmegaConf.select(yaml, key, default=published))
        for name, (key, published) in ORIGINAL_PATHS.items()
    }
    return paths if any(paths[name].exists() for name in ("vae", "text_encoder")) else None


def config_of_original(folder: Path) -> dict[str, Any]:
    """Return the configuration of a transformer in Wan's original layout, for weights that replace its own.

    Args:
        folder: the transformer's folder. Without a config.json, its weights show the number of its blocks; it is
            empty without complete weights, too.

    Raises:
        UserError: (MODEL) config.json cannot be read.
    """
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    found = chosen_set(folder) if folder.is_dir() else None
    if found is None or found.missing:
        return {}
    shapes = open_tensors(folder).shapes()
    blocks = infer_config.BLOCK_TENSORS["wan"].items()
    counts = {key: infer_config.count_modules(shapes, tensor.partition(".#.")[0]) for key, tensor in blocks}
    return {key: count for key, count in counts.items() if count}


def original_components(
    paths: Mapping[str, Path], config_path: str, transformer_path: str | None, vae_path: str | None
) -> dict[str, Component]:
    """Return the components of a model in Wan's original layout that every task needs.

    Args:
        paths: the result of original_paths.
        config_path: the yaml with the components' settings.
        transformer_path: value of --transformer_path, None if not passed.
        vae_path: value of --vae_path, None if not passed.

    Raises:
        UserError: (MODEL) any error of find_component, or the tokenizer does not exist.
    """
    yaml = read_yaml(config_path)
    flag_values = {"transformer": transformer_path, "vae": vae_path}
    components: dict[str, Component] = {}
    for name in ("transformer", "vae", "text_encoder"):
        known: Any = OmegaConf.to_container(yaml.get(f"{name}_kwargs") or OmegaConf.create())
        if name == "transformer" and transformer_path:
            known = config_of_original(paths[name]) or known
        known = known if isinstance(known, dict) else {}
        components[name] = choose_component(name, flag_values.get(name), paths[name], ORIGINAL_KINDS[name], known)
    components["tokenizer"] = Component(paths["tokenizer"], read_component(paths["tokenizer"], check_weights=False))
    return components
