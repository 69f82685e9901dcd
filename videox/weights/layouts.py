"""Maps tensor names and shapes between diffusers and the original checkpoints, in both directions.

A layout is a table of module names. A tensor of one side is the concatenation of ranges of tensors of the other side:
mostly one full tensor; HunyuanVideo's fused projections are split into three or four. No tensor value is read, so
mapping takes no time for any model size, and a slice of a tensor can be located without the rest.

diffusers has converters for one of the two directions only; they need the full model in memory and support the
published widths only. The tests check that these tables agree with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from videox.weights.layout_tables import COMFYUI_HUNYUAN, MARKERS, TABLES, UNUSED

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `begin` to `begin + count` of a tensor, in row-major order."""

    name: str
    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the target layout: its name, its shape, and the source pieces it is the concatenation of."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]


PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "module.", "transformer.", "vae.", "model.")
LEAF = r"(|\.weight|\.bias|\.gamma)"

# ------------------------------------------------------------------------------------------------ which layout


def shared_prefix(names: Iterable[str]) -> str:
    """Return the prefix that all names share, such as "model.diffusion_model.", or ""."""
    names = list(names)
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix + shared_prefix(name.removeprefix(prefix) for name in names)
    return ""


def layout_of(names: Iterable[str]) -> str | None:
    """Return the layout that these original names belong to; None if there is none (e.g. diffusers' names)."""
    names = set(names)
    return next((layout for layout, (mark, _) in MARKERS.items() if mark in names), None)


def family_of(names: Iterable[str]) -> str | None:
    """Return the layout whose diffusers names these are, or None."""
    names = set(names)
    return next((layout for layout, (_, mark) in MARKERS.items() if mark in names), None)


@cache
def _comfyui_patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((_pattern(comfyui), published) for comfyui, published in COMFYUI_HUNYUAN.items())


def published_name(name: str) -> str:
    """Return the published name of a tensor that ComfyUI may have saved under its own name."""
    for pattern, published in _comfyui_patterns():
        if match := pattern.match(name):
            return _fill(published, match)
    return name


# ------------------------------------------------------------------------------------------------ both directions


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)") + LEAF + "$")


@cache
def _forward(layout: str) -> tuple[tuple[re.Pattern[str], str, tuple[str, ...]], ...]:
    """Return (pattern, template, diffusers templates) for each original module."""
    rows = TABLES[layout].items()
    return tuple((_pattern(old), old, (new,) if isinstance(new, str) else new) for old, new in rows)


def _fill(template: str, match: re.Match[str]) -> str:
    numbers = iter(match.groups()[:-1])
    return re.sub("#", lambda _: next(numbers), template) + match.groups()[-1]


def targets(layout: str, name: str) -> tuple[str, ...]:
    """Return the diffusers names of an original tensor, in the order of its rows; its own name if it is unknown.

    A leading ~ is kept: the halves of the rows are swapped.
    """
    for pattern, _, new in _forward(layout):
        if match := pattern.match(name):
            return tuple(_fill(template, match) for template in new)
    return (name,)


@cache
def _backward(layout: str) -> tuple[tuple[re.Pattern[str], str, tuple[str, ...]], ...]:
    """Return (pattern of a diffusers module, original template, diffusers templates of all parts) for each module."""
    return tuple((_pattern(part.removeprefix("~")), old, new) for _, old, new in _forward(layout) for part in new)


def sources(layout: str, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the original name of a diffusers tensor, and the diffusers names of all parts of that original tensor."""
    for pattern, old, new in _backward(layout):
        if match := pattern.match(name):
            return _fill(old, match), tuple(_fill(template, match) for template in new)
    return name, (name,)


def _rows(name: str, count: int, shapes: Shapes) -> list[int]:
    """Return the number of rows of each part of a fused tensor: the input width, and the rest for the last part."""
    weight = re.sub(r"\.bias$", ".weight", name)
    if count == 1 or weight not in shapes:
        return [shapes[name][0]]
    width, total = shapes[weight][1], shapes[name][0]
    return [*[width] * (count - 1), total - (count - 1) * width]


def _shape(layout: str, name: str, shape: Shape) -> Shape:
    """Return the diffusers shape of a tensor that is not split: CLIP's embeddings lose leading dimensions of 1."""
    if layout == "clip_vision" and name in ("visual.cls_embedding", "visual.pos_embedding"):
        return tuple(shape[shape.count(1) if name.endswith("cls_embedding") else 1 :])
    return shape


def to_diffusers(layout: str, shapes: Shapes) -> list[Entry]:
    """List the diffusers tensors of a model in the original layout; a tensor that is unknown keeps its name.

    Args:
        layout: a key of TABLES.
        shapes: shapes of the original tensors, by name.
    """
    entries = []
    block_names = _block_names(shapes) if layout == "wan_vae" else {}
    for name, shape in shapes.items():
        if layout in UNUSED and UNUSED[layout].match(name):
            continue
        parts = targets(layout, block_names.get(name, name))
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
    """List the original tensors of a diffusers model; a tensor that is unknown keeps its name.

    Args:
        layout: a key of TABLES that names a transformer or Wan's VAE.
        shapes: shapes of the diffusers tensors, by name.
    """
    entries: list[Entry] = []
    done: set[str] = set()
    matches = (re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)", name) for name in shapes)
    resnets = max((int(match[1]) + 1 for match in matches if match), default=0)
    nested = any(name.startswith("encoder.down_blocks.0.resnets.") for name in shapes)
    for name, shape in shapes.items():
        if name in done:
            continue
        original, parts = sources(layout, name)
        if layout == "wan_vae":
            original = _original_nested(original, shapes) if nested else _consecutive_name(original, resnets)
        if len(parts) == 1:
            entries.append(replace(_single(parts[0], name, shape), name=original))
            continue
        done |= set(parts)
        present = [part for part in parts if part in shapes]
        rows = sum(shapes[part][0] for part in present)
        pieces = tuple(Piece(part, 0, prod(shapes[part])) for part in present)
        entries.append(Entry(original, (rows, *shape[1:]), pieces))
    return entries


# Modules of a numbered block of the VAE of Wan2.2 TI2V-5B, and the name of its sampler.
NESTED = re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(?:down|up)samples\.(\d+)\.(.*)")
SAMPLERS = {"encoder": ("downsamples", "downsampler"), "decoder": ("upsamples", "upsampler")}


def _block_names(shapes: Shapes) -> dict[str, str]:
    """Map each consecutively numbered tensor of the VAE decoder to a name with block and index inside the block.

    A block is its resnets followed by one upsampler; the position of the first upsampler gives the block length. In
    the VAE of Wan2.2 TI2V-5B the names have both numbers, in the encoder too.
    """
    if nested := {name: match for name in shapes if (match := NESTED.fullmatch(name))}:
        return {name: _nested_name(*match.groups()) for name, match in nested.items()}
    matches = [re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name) for name in shapes]
    resnets = min((int(m[1]) for m in matches if m and m[2].startswith("resample.")), default=0)
    names = {}
    for match in (match for match in matches if match):
        block, index = divmod(int(match[1]), resnets + 1)
        module = f"upsamplers.{block}" if index == resnets else f"resnets.{block}.{index}"
        names[match[0]] = f"decoder.{module}.{match[2]}"
    return names


def _nested_name(part: str, block: str, index: str, rest: str) -> str:
    side = part.partition(".")[0]
    if rest.startswith(("resample.", "time_conv.")):
        return f"{side}.{SAMPLERS[side][1]}.{block}.{rest}"
    return f"{side}.resnets.{block}.{index}.{rest}"


def _original_nested(name: str, shapes: Shapes) -> str:
    """Invert _nested_name; shapes: of the diffusers tensors, whose resnets come before the sampler of a block."""
    if match := re.fullmatch(r"(encoder|decoder)\.resnets\.(\d+)\.(\d+)\.(.*)", name):
        side, block, index, rest = match.groups()
        samples = SAMPLERS[side][0]
        return f"{side}.{samples}.{block}.{samples}.{index}.{rest}"
    if match := re.fullmatch(r"(encoder|decoder)\.(?:down|up)sampler\.(\d+)\.(.*)", name):
        side, block, rest = match.groups()
        samples, blocks = SAMPLERS[side][0], "down_blocks" if side == "encoder" else "up_blocks"
        resnets = re.compile(rf"{side}\.{blocks}\.{block}\.resnets\.(\d+)\.")
        index = 1 + max((int(found[1]) for other in shapes if (found := resnets.match(other))), default=-1)
        return f"{side}.{samples}.{block}.{samples}.{index}.{rest}"
    return name


def _consecutive_name(name: str, resnets: int) -> str:
    """Invert _block_names, given the number of resnets per block."""
    if match := re.match(r"decoder\.resnets\.(\d+)\.(\d+)\.(.*)", name):
        return f"decoder.upsamples.{int(match[1]) * (resnets + 1) + int(match[2])}.{match[3]}"
    if match := re.match(r"decoder\.upsamplers\.(\d+)\.(.*)", name):
        return f"decoder.upsamples.{int(match[1]) * (resnets + 1) + resnets}.{match[2]}"
    return name
