"""Serves whoever moves weights between programs: the names of one and the same tensors in diffusers and elsewhere.

A layout is a table of module names. A tensor of one side is made of stretches of tensors of the other side, laid end
to end: most are one whole tensor, HunyuanVideo's fused projections are cut in three or four. Nothing here reads a
value, so that a model of any size is mapped in an instant, and a slice of a tensor is found without the rest.

diffusers has converters for one of the two directions; they take whole models in memory and know the published widths
only. The tests hold these tables equal to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from videox.weights.layout_tables import COMFYUI_HUNYUAN, MARKS, TABLES, UNUSED

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `begin` to `begin + count` of a tensor, counted in its memory order."""

    name: str
    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the target layout: its name, its shape, and what it is made of, first to last."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]


PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "module.", "transformer.", "vae.", "model.")
LEAF = r"(|\.weight|\.bias|\.gamma)"

# ------------------------------------------------------------------------------------------------ which layout


def shared_prefix(names: Iterable[str]) -> str:
    """Returns the prefix that a program has put before every name ("model.diffusion_model." and the like), or ""."""
    names = list(names)
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix + shared_prefix(name.removeprefix(prefix) for name in names)
    return ""


def layout_of(names: Iterable[str]) -> str | None:
    """Returns the layout whose original names these are, None where they are nobody's (diffusers', for instance)."""
    names = set(names)
    return next((layout for layout, (mark, _) in MARKS.items() if mark in names), None)


def family_of(names: Iterable[str]) -> str | None:
    """Returns the layout whose names these are in diffusers, or None."""
    names = set(names)
    return next((layout for layout, (_, mark) in MARKS.items() if mark in names), None)


@cache
def _comfyui() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((_pattern(theirs), published) for theirs, published in COMFYUI_HUNYUAN.items())


def published_name(name: str) -> str:
    """Returns the published name of a tensor that ComfyUI may have saved under a name of its own."""
    for pattern, published in _comfyui():
        if match := pattern.match(name):
            return _fill(published, match)
    return name


# ------------------------------------------------------------------------------------------------ both directions


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)") + LEAF + "$")


@cache
def _forward(layout: str) -> tuple[tuple[re.Pattern[str], str, tuple[str, ...]], ...]:
    """Returns (pattern, template, diffusers' templates) of each original module."""
    rows = TABLES[layout].items()
    return tuple((_pattern(old), old, (new,) if isinstance(new, str) else new) for old, new in rows)


def _fill(template: str, match: re.Match[str]) -> str:
    numbers = iter(match.groups()[:-1])
    return re.sub("#", lambda _: next(numbers), template) + match.groups()[-1]


def targets(layout: str, name: str) -> tuple[str, ...]:
    """Returns the names in diffusers of an original tensor, in the order of its rows; its own name if nobody knows it.

    A leading ~ is kept: the halves change places.
    """
    for pattern, _, new in _forward(layout):
        if match := pattern.match(name):
            return tuple(_fill(template, match) for template in new)
    return (name,)


@cache
def _backward(layout: str) -> tuple[tuple[re.Pattern[str], str, tuple[str, ...]], ...]:
    """Returns (pattern of one of diffusers' modules, original template, diffusers' templates of all its parts)."""
    return tuple((_pattern(part.removeprefix("~")), old, new) for _, old, new in _forward(layout) for part in new)


def sources(layout: str, name: str) -> tuple[str, tuple[str, ...]]:
    """Returns the original name of a diffusers tensor, and diffusers' names of all the parts that it is made of."""
    for pattern, old, new in _backward(layout):
        if match := pattern.match(name):
            return _fill(old, match), tuple(_fill(template, match) for template in new)
    return name, (name,)


def _rows(name: str, count: int, shapes: Shapes) -> list[int]:
    """Returns how many rows of a fused tensor each part has: as many as there are inputs, the last what is left."""
    weight = re.sub(r"\.bias$", ".weight", name)
    if count == 1 or weight not in shapes:
        return [shapes[name][0]]
    width, total = shapes[weight][1], shapes[name][0]
    return [*[width] * (count - 1), total - (count - 1) * width]


def _shape(layout: str, name: str, shape: Shape) -> Shape:
    """Returns the shape in diffusers of a tensor that is not cut: CLIP's embeddings lose their leading ones."""
    if layout == "clip_vision" and name in ("visual.cls_embedding", "visual.pos_embedding"):
        return tuple(shape[shape.count(1) if name.endswith("cls_embedding") else 1 :])
    return shape


def to_diffusers(layout: str, shapes: Shapes) -> list[Entry]:
    """Returns the tensors that a model in the original layout has in diffusers; one that nobody knows keeps its name.

    Args:
        layout: a key of TABLES.
        shapes: of the original tensors, by name.
    """
    entries = []
    numbered = _grouped(shapes) if layout == "wan_vae" else {}
    for name, shape in shapes.items():
        if layout in UNUSED and UNUSED[layout].match(name):
            continue
        parts = targets(layout, numbered.get(name, name))
        if len(parts) == 1:
            entries.append(_single(parts[0], name, _shape(layout, name, shape)))
            continue
        begin, row = 0, prod(shape[1:])
        for part, rows in zip(parts, _rows(name, len(parts), shapes), strict=False):
            entries.append(Entry(part, (rows, *shape[1:]), (Piece(name, begin, rows * row),)))
            begin += rows * row
    return entries


def _single(target: str, name: str, shape: Shape) -> Entry:
    size = prod(shape)
    if not target.startswith("~"):
        return Entry(target, shape, (Piece(name, 0, size),))
    halves = (Piece(name, size // 2, size - size // 2), Piece(name, 0, size // 2))
    return Entry(target.removeprefix("~"), shape, halves)


def to_original(layout: str, shapes: Shapes) -> list[Entry]:
    """Returns the tensors that a model of diffusers has in the original layout; one that nobody knows keeps its name.

    Args:
        layout: a key of TABLES; of a transformer or Wan's autoencoder.
        shapes: of the tensors in diffusers, by name.
    """
    entries: list[Entry] = []
    done: set[str] = set()
    counted = (re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)", name) for name in shapes)
    resnets = max((int(match[1]) + 1 for match in counted if match), default=0)
    for name, shape in shapes.items():
        if name in done:
            continue
        original, parts = sources(layout, name)
        if layout == "wan_vae":
            original = _counted_through(original, resnets)
        if len(parts) == 1:
            entries.append(replace(_single(parts[0], name, shape), name=original))
            continue
        done |= set(parts)
        there = [part for part in parts if part in shapes]
        rows = sum(shapes[part][0] for part in there)
        pieces = tuple(Piece(part, 0, prod(shapes[part])) for part in there)
        entries.append(Entry(original, (rows, *shape[1:]), pieces))
    return entries


def _grouped(shapes: Shapes) -> dict[str, str]:
    """Returns for each tensor of the decoder's counted-through blocks its name with block and place in the block."""
    found = [re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name) for name in shapes]
    resnets = min((int(m[1]) for m in found if m and m[2].startswith("resample.")), default=0)
    names = {}
    for match in (match for match in found if match):
        block, place = divmod(int(match[1]), resnets + 1)
        where = f"upsamplers.{block}" if place == resnets else f"resnets.{block}.{place}"
        names[match[0]] = f"decoder.{where}.{match[2]}"
    return names


def _counted_through(name: str, resnets: int) -> str:
    """Undoes _grouped, where every block has so many resnets."""
    if match := re.match(r"decoder\.resnets\.(\d+)\.(\d+)\.(.*)", name):
        return f"decoder.upsamples.{int(match[1]) * (resnets + 1) + int(match[2])}.{match[3]}"
    if match := re.match(r"decoder\.upsamplers\.(\d+)\.(.*)", name):
        return f"decoder.upsamples.{int(match[1]) * (resnets + 1) + resnets}.{match[2]}"
    return name
