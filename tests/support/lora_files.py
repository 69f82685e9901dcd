"""Writes LoRA files as other trainers do, from tables of their names (tests/data/lora_layouts.json), not by videox."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from videox.weights.safetensors_io import StoredTensors

TABLES = json.loads((tiny.ROOT / "tests/data/lora_layouts.json").read_text(encoding="utf-8"))
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "wan t2v": tiny.build_wan_t2v, "wan i2v": tiny.build_wan_i2v, "hunyuan t2v": tiny.build_hunyuan_t2v,
}  # fmt: skip
RANK, SCALE = 4, 0.5  # alpha / rank is a power of two: multiplied into B it rounds nothing


@dataclass(frozen=True)
class Source:
    """One set of adapters for a tiny model; every file is made from it.

    Attributes:
        kind: a key of BUILDERS.
        folder: of the transformer.
        adapters: A and B by diffusers' module name; the modules of one published layer share A.
    """

    kind: str
    folder: Path
    adapters: dict[str, tuple[Tensor, Tensor]]

    @property
    def family(self) -> str:
        return self.kind.split()[0]

    def keep(self, *parts: str) -> Source:
        """Return the adapters of modules whose names contain one of these parts."""
        kept = {name: pair for name, pair in self.adapters.items() if any(part in name for part in parts)}
        return Source(self.kind, self.folder, kept)

    def published(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A and B by published names; of a fused layer the rows of B of its parts, which share A."""
        layers = {}
        for old, new in modules(self.family, self.adapters).items():
            if parts := [name for name in new if name in self.adapters]:
                assert parts == new, "a fused layer is adapted as a whole"
                layers[old] = (self.adapters[parts[0]][0], torch.cat([self.adapters[name][1] for name in parts]))
        return layers


def modules(family: str, adapted: Iterable[str]) -> dict[str, list[str]]:
    """Return diffusers' names by the published name of every layer of the blocks that occur in these names."""
    numbers = {number for name in adapted for number in re.findall(r"\.(\d+)\.", name)[:1]}
    table = TABLES["modules"][family]["names"]
    return {
        old.replace("#", number): [name.replace("#", number) for name in new]
        for number in sorted(numbers)
        for old, new in table.items()
    }


def make_source(kind: str, folder: Path) -> Source:
    """Build a tiny model, and adapters for every layer of its blocks that the tables name."""
    transformer = BUILDERS[kind](folder) / "transformer"
    stored, draw = StoredTensors(transformer), torch.Generator().manual_seed(5)
    names, adapters = set(stored), {}
    blocks = [name.removesuffix(".weight") for name in stored if re.match(r"(single_)?(transformer_)?blocks\.", name)]
    for new in modules(kind.split()[0], blocks).values():
        parts = [name for name in new if f"{name}.weight" in names]
        for name in parts:
            outputs, inputs = stored.shape(f"{name}.weight")
            a = adapters[parts[0]][0] if name != parts[0] else torch.randn(RANK, inputs, generator=draw)
            adapters[name] = (a, torch.randn(outputs, RANK, generator=draw))
    return Source(kind, transformer, adapters)


def write(
    source: Source, layout: str, path: Path, *, diffusers_names: bool = False, comfyui_names: bool = False
) -> Path:
    """Write a LoRA as a row of the table describes it.

    Args:
        source: the adapters.
        layout: a key of the table's layouts. Without an alpha, the scale is multiplied into B.
        path: of the file.
        diffusers_names: use diffusers' module names instead of the published ones.
        comfyui_names: use ComfyUI's own names of HunyuanVideo's modules.
    """
    row, tensors = TABLES["layouts"][layout], {}
    for name, (a, b) in (source.adapters if diffusers_names else source.published()).items():
        if comfyui_names:
            for published, own in TABLES["modules"]["hunyuan"]["comfyui"].items():
                name = name.replace(published, own)
        flat = name.replace(".", "_")
        names = {
            "name": name,
            "flat": flat,
            "mixed": re.sub(r"^(\w+)\.(\d+)", r"\1_\2", name),
            "flat_blocks": re.sub(r"^(\D+_\d+)_", r"\1__orig_mod_", flat),
        }
        for half, tensor in zip(row["halves"], (a, b if row["alpha"] else SCALE * b), strict=True):
            tensors[row["half"].format(half=half, **names)] = tensor.clone()
        if row["alpha"]:
            tensors[row["alpha"].format(**names)] = torch.tensor(SCALE * RANK)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def empty_model(layers: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Return a module with a linear layer of each name, for peft to adapt."""
    root = nn.Module()
    for name, (a, b) in layers.items():
        parent = root
        *parents, leaf = name.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(a.shape[1], b.shape[0], bias=False))
    return root
