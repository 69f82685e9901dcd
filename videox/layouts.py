"""Serves whoever moves weights between programs: the names of one and the same tensors in diffusers and elsewhere.

A layout is a table of module names. A tensor of one side is made of stretches of tensors of the other side, laid end to
end: most are one whole tensor, HunyuanVideo's fused projections are cut in three or four. Nothing here reads a value, so
that a model of any size is mapped in an instant, and a slice of a tensor is found without the rest. diffusers has
converters for one of the two directions; they take whole models in memory and know the published widths only, and the
tests hold these tables equal to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

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


# Modules by name, original -> diffusers; # stands for a number. Several names: the original has their rows one after
# the other. A leading ~ means that the two halves of the rows change places.
Table = Mapping[str, tuple[str, ...] | str]

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
WAN: Table = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "blocks.#.modulation": "blocks.#.scale_shift_table",
    "blocks.#.norm3": "blocks.#.norm2",  # of the cross-attention; the other two norms have no weights
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    **{f"blocks.#.self_attn.{old}": f"blocks.#.attn1.{new}" for old, new in ATTENTION.items()},
    **{f"blocks.#.cross_attn.{old}": f"blocks.#.attn2.{new}" for old, new in ATTENTION.items()},
    "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
    "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
    "blocks.#.cross_attn.norm_k_img": "blocks.#.attn2.norm_added_k",
}

REFINER, REFINED = "txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#"
DOUBLE, SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
HUNYUAN: Table = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    f"{REFINER}.norm1": f"{REFINED}.norm1",
    f"{REFINER}.norm2": f"{REFINED}.norm2",
    f"{REFINER}.self_attn_qkv": tuple(f"{REFINED}.attn.to_{x}" for x in "qkv"),
    f"{REFINER}.self_attn_proj": f"{REFINED}.attn.to_out.0",
    f"{REFINER}.mlp.fc1": f"{REFINED}.ff.net.0.proj",
    f"{REFINER}.mlp.fc2": f"{REFINED}.ff.net.2",
    f"{REFINER}.adaLN_modulation.1": f"{REFINED}.norm_out.linear",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.#.img_mod.linear": f"{DOUBLE}.norm1.linear",
    "double_blocks.#.img_attn_qkv": tuple(f"{DOUBLE}.attn.to_{x}" for x in "qkv"),
    "double_blocks.#.img_attn_q_norm": f"{DOUBLE}.attn.norm_q",
    "double_blocks.#.img_attn_k_norm": f"{DOUBLE}.attn.norm_k",
    "double_blocks.#.img_attn_proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.#.img_mlp.fc1": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.#.img_mlp.fc2": f"{DOUBLE}.ff.net.2",
    "double_blocks.#.txt_mod.linear": f"{DOUBLE}.norm1_context.linear",
    "double_blocks.#.txt_attn_qkv": tuple(f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.#.txt_attn_q_norm": f"{DOUBLE}.attn.norm_added_q",
    "double_blocks.#.txt_attn_k_norm": f"{DOUBLE}.attn.norm_added_k",
    "double_blocks.#.txt_attn_proj": f"{DOUBLE}.attn.to_add_out",
    "double_blocks.#.txt_mlp.fc1": f"{DOUBLE}.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.fc2": f"{DOUBLE}.ff_context.net.2",
    "single_blocks.#.modulation.linear": f"{SINGLE}.norm.linear",
    "single_blocks.#.linear1": (*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"),
    "single_blocks.#.linear2": f"{SINGLE}.proj_out",
    "single_blocks.#.q_norm": f"{SINGLE}.attn.norm_q",
    "single_blocks.#.k_norm": f"{SINGLE}.attn.norm_k",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",  # shift and scale there, scale and shift here
}
# What ComfyUI calls HunyuanVideo's modules when it saves a model itself -> the published name.
COMFYUI_NORMS = {
    f"{comfyui}.{kind}_norm.{leaf}": f"{published}{kind[0]}_norm.weight"
    for comfyui, published in (
        ("double_blocks.#.img_attn.norm", "double_blocks.#.img_attn_"),
        ("double_blocks.#.txt_attn.norm", "double_blocks.#.txt_attn_"),
        ("single_blocks.#.norm", "single_blocks.#."),
    )
    for kind in ("query", "key")
    for leaf in ("scale", "weight")
}
COMFYUI_HUNYUAN: Mapping[str, str] = {
    "txt_in.t_embedder.in_layer": "txt_in.t_embedder.mlp.0",
    "txt_in.t_embedder.out_layer": "txt_in.t_embedder.mlp.2",
    "txt_in.c_embedder.in_layer": "txt_in.c_embedder.linear_1",
    "txt_in.c_embedder.out_layer": "txt_in.c_embedder.linear_2",
    f"{REFINER}.self_attn.qkv": f"{REFINER}.self_attn_qkv",
    f"{REFINER}.self_attn.proj": f"{REFINER}.self_attn_proj",
    f"{REFINER}.mlp.0": f"{REFINER}.mlp.fc1",
    f"{REFINER}.mlp.2": f"{REFINER}.mlp.fc2",
    **{f"{x}_in.in_layer": f"{x}_in.mlp.0" for x in ("time", "guidance")},
    **{f"{x}_in.out_layer": f"{x}_in.mlp.2" for x in ("time", "guidance")},
    **{
        f"double_blocks.#.{side}_{comfyui}": f"double_blocks.#.{side}_{published}"
        for side in ("img", "txt")
        for comfyui, published in (
            ("mod.lin", "mod.linear"), ("attn.qkv", "attn_qkv"), ("attn.proj", "attn_proj"), ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
        )
    },
    "single_blocks.#.modulation.lin": "single_blocks.#.modulation.linear",
    **COMFYUI_NORMS,
}  # fmt: skip

RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
RESNET = {**RESIDUAL, "shortcut": "conv_shortcut"}
WAN_VAE: Table = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{f"{side}.conv1": f"{side}.conv_in" for side in ("encoder", "decoder")},
    **{f"{side}.head.0": f"{side}.norm_out" for side in ("encoder", "decoder")},
    **{f"{side}.head.2": f"{side}.conv_out" for side in ("encoder", "decoder")},
    **{
        f"{side}.middle.{number}.{old}": f"{side}.mid_block.resnets.{number // 2}.{new}"
        for side in ("encoder", "decoder")
        for number in (0, 2)
        for old, new in RESIDUAL.items()
    },
    **{
        f"{side}.middle.1.{name}": f"{side}.mid_block.attentions.0.{name}"
        for side in ("encoder", "decoder")
        for name in ("norm", "to_qkv", "proj")
    },
    **{f"encoder.downsamples.#.{old}": f"encoder.down_blocks.#.{new}" for old, new in RESNET.items()},
    "encoder.downsamples.#.resample.1": "encoder.down_blocks.#.resample.1",
    "encoder.downsamples.#.time_conv": "encoder.down_blocks.#.time_conv",
    # the decoder's blocks are counted through in the original; _grouped and _counted_through change the numbers
    **{f"decoder.resnets.#.#.{old}": f"decoder.up_blocks.#.resnets.#.{new}" for old, new in RESNET.items()},
    "decoder.upsamplers.#.resample.1": "decoder.up_blocks.#.upsamplers.0.resample.1",
    "decoder.upsamplers.#.time_conv": "decoder.up_blocks.#.upsamplers.0.time_conv",
}

LAYER = "encoder.block.#.layer"
UMT5: Table = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.#.norm1": f"{LAYER}.0.layer_norm",
    **{f"blocks.#.attn.{x}": f"{LAYER}.0.SelfAttention.{x}" for x in "qkvo"},
    "blocks.#.pos_embedding.embedding": f"{LAYER}.0.SelfAttention.relative_attention_bias",
    "blocks.#.norm2": f"{LAYER}.1.layer_norm",
    "blocks.#.ffn.gate.0": f"{LAYER}.1.DenseReluDense.wi_0",
    "blocks.#.ffn.fc1": f"{LAYER}.1.DenseReluDense.wi_1",
    "blocks.#.ffn.fc2": f"{LAYER}.1.DenseReluDense.wo",
}

CLIP_VISION: Table = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding": "embeddings.patch_embedding",
    "visual.pre_norm": "pre_layrnorm",
    "visual.post_norm": "post_layernorm",
    "visual.transformer.#.norm1": "encoder.layers.#.layer_norm1",
    "visual.transformer.#.norm2": "encoder.layers.#.layer_norm2",
    "visual.transformer.#.attn.to_qkv": tuple(f"encoder.layers.#.self_attn.{x}_proj" for x in "qkv"),
    "visual.transformer.#.attn.proj": "encoder.layers.#.self_attn.out_proj",
    "visual.transformer.#.mlp.0": "encoder.layers.#.mlp.fc1",
    "visual.transformer.#.mlp.2": "encoder.layers.#.mlp.fc2",
}

TABLES: Mapping[str, Table] = {
    "wan": WAN, "hunyuan": HUNYUAN, "wan_vae": WAN_VAE, "umt5": UMT5, "clip_vision": CLIP_VISION,
}  # fmt: skip
# One tensor by which each layout is told, under its original name and under diffusers'.
MARKS = {
    "wan": ("head.modulation", "condition_embedder.time_proj.weight"),
    "hunyuan": ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "context_embedder.proj_in.weight"),
    "wan_vae": ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"),
    "umt5": ("blocks.0.ffn.gate.0.weight", "encoder.final_layer_norm.weight"),
    "clip_vision": ("visual.cls_embedding", "embeddings.class_embedding"),
}
# Not of the image encoder: the other tower, and the projection that Wan does not use.
UNUSED = {"clip_vision": re.compile(r"textual\.|log_scale$|visual\.head$")}
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
    return tuple(
        (_pattern(part.removeprefix("~")), old, new) for _, old, new in _forward(layout) for part in new
    )


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
    """Returns the shape in diffusers of a tensor that is not cut: CLIP's embeddings have leading ones in the original."""
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
            entries.append(replace_name(_single(parts[0], name, shape), original))
            continue
        done |= set(parts)
        there = [part for part in parts if part in shapes]
        rows = sum(shapes[part][0] for part in there)
        pieces = tuple(Piece(part, 0, prod(shapes[part])) for part in there)
        entries.append(Entry(original, (rows, *shape[1:]), pieces))
    return entries


def replace_name(entry: Entry, name: str) -> Entry:
    """Returns the same tensor under another name."""
    return Entry(name, entry.shape, entry.pieces)


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


def stretch(entry: Entry, begin: int, count: int) -> Iterator[Piece]:
    """Yields what elements `begin` to `begin + count` of an entry are made of, for a reader of slices."""
    for piece in entry.pieces:
        skipped = min(begin, piece.count)
        taken = min(count, piece.count - skipped)
        if taken > 0:
            yield Piece(piece.name, piece.begin + skipped, taken)
        begin, count = begin - skipped, count - taken
