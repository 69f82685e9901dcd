"""Parses the tensor names in LoRA files of any trainer: which module of the model, and which part of its adapter.

Trainers write the same module under names that differ in a prefix (`diffusion_model.`, `lora_unet_`, ...), in the
separator (kohya's networks replace every dot by an underscore) and in the layout (diffusers', the published
checkpoint's, ComfyUI's). All of them are compared without prefix and with underscores only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from videox.weights.layout_tables import COMFYUI_HUNYUAN, TABLES

FAMILIES = ("wan", "hunyuan")
# A, B and alpha as peft, kohya's networks and older diffusers name them; peft inserts the adapter's name.
HALF = re.compile(r"(.+?)[._]lora(?:_(A|B|down|up)|\.(down|up))(?:\.([^.]+))?\.weight")
ALPHA = re.compile(r"(.+)\.alpha")
HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
COMPILED = "_orig_mod"  # torch.compile inserts it as the name of the module that it wraps
DOTTED_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "transformer3d.", "pipe.dit.",
    "dit.", "module.", "model.",
)  # fmt: skip
KOHYA_PREFIX = "lora_unet_"
FLAT_PREFIXES = (KOHYA_PREFIX, "lora_transformer_", "lycoris_")


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the transformer, as a file names it.

    Attributes:
        name: with dots, e.g. "blocks.0.self_attn.q"; of ComfyUI's names the published one.
        published: `name` is that of the published checkpoint; otherwise it is diffusers'.
    """

    name: str
    published: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of an adapter.

    Attributes:
        module: the adapted module.
        kind: "A" [rank, inputs], "B" [outputs, rank], or "alpha".
    """

    module: Module
    kind: str


def parse(name: str, family: str) -> Part | None:
    """Return what a tensor name in a LoRA file stands for; None if it is of no module of the family, or no adapter.

    Args:
        name: e.g. "lora_unet_blocks_0_self_attn_q.lora_down.weight".
        family: "wan" | "hunyuan".
    """
    if match := HALF.fullmatch(name):
        kind = HALVES[match[2] or match[3]]
    elif match := ALPHA.fullmatch(name):
        kind = "alpha"
    else:
        return None
    module = find_module(match[1], family)
    return Part(module, kind) if module else None


def find_module(name: str, family: str) -> Module | None:
    """Return the module of a family that a name without `.lora_A.weight` or the like stands for, or None."""
    flat, known = _flatten(name), _modules(family)
    if flat in known:
        return known[flat]
    if not (number := re.search(r"(?<=_)\d+(?=_)", flat)):
        return None
    found = known.get(f"{flat[: number.start()]}#{flat[number.end() :]}")
    return found and Module(found.name.replace("#", number[0]), found.published)


def family_of_names(names: Iterable[str]) -> str:
    """Return the family that most of the names belong to."""
    names = list(names)
    return max(FAMILIES, key=lambda family: sum(parse(name, family) is not None for name in names))


def describe_names(names: Iterable[str], family: str) -> str:
    """Return which trainers' naming a file has, for messages."""
    names = [name for name in names if HALF.fullmatch(name)]
    first = names[0] if names else ""
    part = parse(first, family)
    if re.match(r"lora_unet__(?!orig_mod)", first):  # VideoX-Fun has an empty name after the prefix
        return "VideoX-Fun's names"
    if first.startswith(FLAT_PREFIXES):
        return "kohya's names"
    if first.startswith("base_model."):
        return "peft's names"
    layout = "original" if part and part.module.published else "diffusers'"
    return "ComfyUI's names" if first.startswith("diffusion_model.") else f"{layout} names"


def strip_prefixes(name: str) -> str:
    """Return a name without the prefixes that trainers and wrappers add."""
    name = name.replace(f"{COMPILED}.", "")
    while prefix := next((p for p in (*DOTTED_PREFIXES, *FLAT_PREFIXES) if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _flatten(name: str) -> str:
    flat = strip_prefixes(name).replace(".", "_")
    return flat.replace(f"_{COMPILED}_", "_").removeprefix(f"{COMPILED}_").lstrip("_")


@cache
def _modules(family: str) -> Mapping[str, Module]:
    """Map each module's name with underscores to the module; # stands for the number of its block."""
    table = TABLES[family]
    new = [part for parts in table.values() for part in ((parts,) if isinstance(parts, str) else parts)]
    # diffusers' names come last: a module that has one name in both layouts is not fused.
    modules = {_flatten(old): Module(old, published=True) for old in table}
    if family == "hunyuan":
        modules |= {_flatten(name): Module(old, published=True) for name, old in COMFYUI_HUNYUAN.items()}
    return modules | {
        _flatten(part.removeprefix("~")): Module(part.removeprefix("~"), published=False) for part in new
    }
