"""Serves both train.py scripts: a part of a model, found by what its files hold, and loaded whole or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from omegaconf import DictConfig, OmegaConf

from videox.models import infer_config as model_configs
from videox.errors import UNLOADABLE, MODEL, UserError
from videox.weights.layouts import family_of
from videox.lora.reader import lora_file
from videox.models.folder import load_strictly, read_component, read_json, read_yaml, refuse_not_finite
from videox.weights.header import stored_config
from videox.weights.reader import LayoutTensors, open_tensors
from videox.weights.safetensors_io import StoredTensors, TensorSource, few

# diffusers' class of each kind that a flag can give.
CLASS_OF = {
    "wan": "WanTransformer3DModel", "hunyuan": "HunyuanVideoTransformer3DModel",
    "wan_vae": "AutoencoderKLWan", "hunyuan_vae": "AutoencoderKLHunyuanVideo",
}  # fmt: skip
ALIGNED = 64  # bytes, as torch aligns what it allocates


@dataclass(frozen=True)
class Component:
    """A part of a model that has been looked at; no weight of it has been read.

    Attributes:
        path: its folder or file.
        config: in the words of its class in diffusers or transformers.
        tensors: where each tensor lies; None for a folder that the class's from_pretrained reads by itself.
    """

    path: Path
    config: dict[str, Any]
    tensors: LayoutTensors | None = None

    def source(self) -> TensorSource:
        """Returns its tensors by diffusers' names, mapped, for who reads slices of them. Raises UserError (MODEL)."""
        return StoredTensors(self.path) if self.tensors is None else self.tensors

    def own_config(self) -> dict[str, Any] | None:
        """Returns its configuration where its folder has none in diffusers' words."""
        return None if self.tensors is None else self.config

    def stored(self) -> LayoutTensors:
        """Returns its tensors by diffusers' names, each read when asked for, whole or in slices. Raises UserError."""
        return open_tensors(self.path) if self.tensors is None else self.tensors


def find_part(path: Path, kind: str, known: Mapping[str, Any] | None = None, *, weighted: bool = True) -> Component:
    """Returns a part of a model in whatever layout it is: told by its tensors' names, not by the name of its file.

    Args:
        path: a folder with config.json and weights, in diffusers' or the original layout, or one file of weights.
        kind: a layout of videox.weights.layouts.TABLES, or the name of a part that has diffusers' names everywhere.
        known: the nearest configuration, for what neither a single file's weights nor its header tell.
        weighted: False takes a folder's word for what its weights would be; a single file is looked at in any case.

    Raises:
        UserError: (MODEL) nothing there, weights of another kind, a broken file, a configuration that contradicts them.
    """
    if lora_file(path) is not None:
        what, hint = "is a LoRA, which has no weights but its own", "begin with it by --init_lora_from"
        raise UserError(str(path), what, f"{hint}, or merge it into its base by scripts/export.py", MODEL)
    own = stored_config(path) if path.is_file() else read_component(path, weighted=weighted)
    refuse_other_class(path, kind, own)
    if own and not weighted and not path.is_file():
        return Component(path, own)
    tensors = open_tensors(path)
    if tensors.layout is None and not path.is_file():
        return Component(path, own)
    known = {**(known or {}), **own}
    found = tensors.layout or family_of(tensors)
    if found not in (kind, None):
        raise UserError(str(path), f"holds weights of the kind {found}, not {kind}", "give the right file", MODEL)
    if found is None:
        return Component(path, known, tensors)
    try:
        config = model_configs.CONFIGS[found](tensors.shapes(), known)
    except KeyError as missing:
        name = str(missing.args[0])
        what = f"has no {tensors.name_in_file(name)}, which every model of the kind {found} has"
        raise UserError(str(path), what, "copy the model anew", MODEL) from missing
    except (ValueError, ZeroDivisionError, TypeError, IndexError) as why:
        raise UserError(str(path), f"has tensors of odd shapes ({why})", "copy the model anew", MODEL) from why
    if tensors.layout == "wan" and (faults := model_configs.contradictions(config, own)):
        raise UserError(str(path), f"its config.json says otherwise: {few(faults)}", "copy the model anew", MODEL)
    return Component(path, {**known, **config} if tensors.layout is None else config, tensors)


def refuse_other_class(path: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Refuses a folder whose configuration names another class of diffusers than that of the kind asked for.

    Names that diffusers does not have are no evidence: the original layout and other trainers have their own.

    Raises:
        UserError: (MODEL) with both classes.
    """
    named, wanted = config.get("_class_name"), CLASS_OF.get(kind)
    if wanted and named != wanted and named in dir(diffusers):
        raise UserError(str(path), f"is {named}, not {wanted}", f"give weights of {wanted}", MODEL)


def choose_part(
    name: str, given: str | None, place: Path, kind: str, known: Mapping[str, Any], *, weighted: bool = True
) -> Component:
    """Returns what --<name>_path gives, or the model's own part at its place; else as find_part.

    Raises:
        UserError: (MODEL) the flag's path does not exist, or as find_part.
    """
    if given and not Path(given).exists():
        hint = "give a folder or file of weights; an id of the hub goes to --pretrained_model_name_or_path alone"
        raise UserError(f"--{name}_path", f"{given} does not exist", hint, MODEL)
    return find_part(Path(given) if given else place, kind, known, weighted=weighted)


def load_part(model_class: Any, part: Component, dtype: torch.dtype | None) -> torch.nn.Module:  # noqa: ANN401 - of diffusers or transformers
    """Returns the model with every weight of the part in it, in eval mode, one tensor in memory beside it at a time.

    Args:
        model_class: of diffusers or transformers.
        dtype: of the floating tensors; None for the one that each is stored in.

    Raises:
        UserError: (MODEL) weights are missing, extra, or of another shape than the configuration says, each by name.
    """
    from_diffusers = hasattr(model_class, "load_config")
    if part.tensors is None:
        return load_strictly(model_class, part.path, dtype=dtype)
    try:
        with init_empty_weights():
            if from_diffusers:
                model = model_class.from_config(part.config)
            else:
                model = model_class(model_class.config_class(**part.config))
    except UNLOADABLE as why:
        cause = " ".join(str(why).split())[:300]
        raise UserError(str(part.path), f"does not make a {model_class.__name__} ({cause})", "check it", MODEL) from why
    wanted = model.state_dict()
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        wanted.pop(tied, None)
    passed_over = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    refuse_misfit(part.tensors, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, passed_over)
    for name in wanted:
        value = part.tensors[name]
        value = value.to(dtype) if value.is_floating_point() and dtype else value
        if value.data_ptr() % ALIGNED:  # kernels sum in another order where memory begins askew
            value = value.clone()
        set_module_tensor_to_device(model, name, "cpu", value=value, dtype=value.dtype)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def load_whole(
    model_class: Any,  # noqa: ANN401 - of diffusers
    part: Component,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """Returns a model in a dtype whose weights all found their place and are finite; raises UserError otherwise."""
    model = load_part(model_class, part, dtype)
    refuse_not_finite(model, part.path)
    return model


def refuse_misfit(
    tensors: LayoutTensors, wanted: Mapping[str, tuple[int, ...]], passed_over: Sequence[str] = ()
) -> None:
    """Raises UserError (MODEL) naming what is missing, extra or of another shape, as the file calls it.

    Args:
        tensors: that are to be loaded.
        wanted: the shapes of the model's.
        passed_over: patterns of names that may be left over, as the model's class says.
    """
    said = tensors.name_in_file
    faults = [f"{said(name)} is missing" for name in sorted(wanted.keys() - tensors.keys())]
    left = [
        name for name in sorted(tensors.keys() - wanted.keys()) if not any(re.search(p, name) for p in passed_over)
    ]
    faults += [f"{said(name)} is not in the model" for name in left]
    faults += [
        f"{said(name)} is {list(tensors.shape(name))}, the model has {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors.shape(name) != shape
    ]
    if faults:
        raise UserError(str(tensors.path), few(faults), "give the weights of one and the same model, whole", MODEL)


# ------------------------------------------------------------------------- Wan2.1's original folder, by its yaml

# The key of the yaml under which a part's place is given, and the place as published.
PLACES = {
    "transformer": ("transformer_additional_kwargs.transformer_subpath", "./"),
    "vae": ("vae_kwargs.vae_subpath", "Wan2.1_VAE.pth"),
    "text_encoder": ("text_encoder_kwargs.text_encoder_subpath", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("text_encoder_kwargs.tokenizer_subpath", "google/umt5-xxl"),
    "image_encoder": (
        "image_encoder_kwargs.image_encoder_subpath",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ),
}
KINDS = {"transformer": "wan", "vae": "wan_vae", "text_encoder": "umt5"}


def original_places(root: Path, config_path: str) -> dict[str, Path] | None:
    """Returns where the parts of a model in Wan's original layout lie, or None if the folder is not in that layout.

    Args:
        root: of the model.
        config_path: the yaml that names the places.
    """
    if (root / "model_index.json").is_file():
        return None
    yaml: DictConfig = read_yaml(config_path)
    places = {part: root / str(OmegaConf.select(yaml, key, default=place)) for part, (key, place) in PLACES.items()}
    return places if any(places[part].exists() for part in ("vae", "text_encoder")) else None


def original_parts(
    places: Mapping[str, Path], config_path: str, transformer_path: str | None, vae_path: str | None
) -> dict[str, Component]:
    """Returns the parts of a model in Wan's original layout that every task needs.

    Raises:
        UserError: (MODEL) as find_part, and for a tokenizer that is not there.
    """
    yaml = read_yaml(config_path)
    given = {"transformer": transformer_path, "vae": vae_path}
    parts: dict[str, Component] = {}
    for name in ("transformer", "vae", "text_encoder"):
        known: Any = OmegaConf.to_container(yaml.get(f"{name}_kwargs") or OmegaConf.create())
        if name == "transformer" and transformer_path and (places[name] / "config.json").is_file():
            known = read_json(places[name] / "config.json")
        known = known if isinstance(known, dict) else {}
        parts[name] = choose_part(name, given.get(name), places[name], KINDS[name], known)
    parts["tokenizer"] = Component(places["tokenizer"], read_component(places["tokenizer"], weighted=False))
    return parts
