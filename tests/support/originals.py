"""Tiny models in the original layouts, and reference computations of their modules, for tests.

data/original_tensors.json lists tensor names and shapes of the published checkpoints, with ranges of layer numbers.
The reference computations follow the definitions of the original modules and use the original names.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from videox.weights import layouts

DATA = Path(__file__).resolve().parents[1] / "data" / "original_tensors.json"
T5_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def published(model: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return (diffusers configuration, shapes by original name) of a published checkpoint."""
    entry = json.loads(DATA.read_text(encoding="utf-8"))[model]
    shapes = {}
    for template, shape in entry["tensors"].items():
        match = re.search(r"\{0-(\d+)\}", template)
        numbers = range(int(match[1]) + 1) if match else (0,)
        for number in numbers:
            shapes[re.sub(r"\{0-\d+\}", str(number), template)] = tuple(shape)
    return entry["config"], shapes


def rebuilt(state: Mapping[str, Tensor], layout: str, *, back: bool = True) -> dict[str, Tensor]:
    """Convert a state dict in memory to the original layout; with back=False from the original layout to diffusers."""
    direction = layouts.to_original if back else layouts.to_diffusers
    entries = direction(layout, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return {
        entry.name: torch.cat([state[p.name].reshape(-1)[p.begin : p.begin + p.count] for p in entry.pieces]).reshape(
            entry.shape
        )
        for entry in entries
    }


def weights(folder: Path) -> dict[str, Tensor]:
    """Load all tensors of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def wan_config(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the config.json of a Wan transformer in the original layout."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "model_type": task,
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }


def build_wan(folder: Path, model: Path, *, shards: int = 1, dtype: torch.dtype | None = None) -> Path:
    """Write a diffusers Wan model in the original layout; return the folder.

    Args:
        folder: the folder to create.
        model: model in diffusers layout; it is image-to-video if it has an image encoder.
        shards: number of files of the transformer.
        dtype: dtype of the transformer; None keeps its own.
    """
    folder.mkdir(parents=True)
    config = json.loads((model / "transformer/config.json").read_text())
    image = model / "image_encoder"
    (folder / "config.json").write_text(json.dumps(wan_config(config, "i2v" if image.is_dir() else "t2v")))
    state = rebuilt(weights(model / "transformer"), "wan")
    write_shards(folder, {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}, shards)
    torch.save(rebuilt(weights(model / "vae"), "wan_vae"), folder / VAE_FILE)
    text = weights(model / "text_encoder")
    text.pop("encoder.embed_tokens.weight", None)
    torch.save(rebuilt(text, "umt5"), folder / T5_FILE)
    shutil.copytree(model / "tokenizer", folder / "google/umt5-xxl")
    if image.is_dir():
        torch.save(original_clip(weights(image)), folder / CLIP_FILE)
    return folder


def build_wan_fun(folder: Path, model: Path) -> Path:
    """Write a diffusers Wan image-to-video model as Wan2.1-Fun InP is published; return the folder.

    It has Wan's own tensor names, and config.json the arguments of VideoX-Fun's class.
    """
    path = build_wan(folder, model) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    width = json.loads((model / "transformer/config.json").read_text(encoding="utf-8"))["text_dim"]
    config |= {
        "_class_name": "WanTransformer3DModel", "in_channels": config["in_dim"], "hidden_size": config["dim"],
        "qk_norm": True, "cross_attn_norm": True, "patch_size": [1, 2, 2], "text_dim": width, "window_size": [-1, -1],
    }  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def build_wan22(folder: Path, model: Path) -> Path:
    """Write a diffusers Wan2.2 in the original layout, with a folder for each expert; return the folder."""
    build_wan(folder, model)
    for path in (folder / "config.json", folder / "diffusion_pytorch_model.safetensors"):
        path.unlink()
    for name, source in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        config = json.loads((model / source / "config.json").read_text())
        task = "i2v" if config["in_channels"] == 36 else "t2v"
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(wan_config(config, task)))
        write_shards(folder / name, rebuilt(weights(model / source), "wan"), 1)
    return folder


def original_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CLIP as published: its image tower under original names, and tensors that Wan does not use."""
    plain = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    found = rebuilt(
        {name: tensor for name, tensor in plain.items() if not name.endswith("position_ids")}, "clip_vision"
    )
    found["visual.cls_embedding"] = found["visual.cls_embedding"].reshape(1, 1, -1)
    found["visual.pos_embedding"] = found["visual.pos_embedding"][None]
    width = found["visual.cls_embedding"].shape[-1]
    unused = {
        "log_scale": torch.ones(()),
        "visual.head": torch.ones(width, 4),
        "textual.head.0.weight": torch.ones(3, 2),
    }
    return {**found, **unused}


def write_shards(folder: Path, state: Mapping[str, Tensor], shards: int) -> None:
    """Write diffusion_pytorch_model*.safetensors, with an index if there are several."""
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(dict(state), folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: state[key] for key in list(state)[number::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


# ------------------------------------------------------------------------------------------ reference computations


def t5_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def t5_bias(table: Tensor, length: int, max_distance: int = 128) -> Tensor:
    """Compute the relative position bias [1, heads, L, L]: half of the buckets per side, far ones logarithmic."""
    half = table.shape[0] // 2
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    side, size, exact = (distance > 0).long() * half, distance.abs(), half // 2
    far = exact + (torch.log(size.clamp(min=1) / exact) / math.log(max_distance / exact) * (half - exact)).long()
    return table[side + torch.where(size < exact, size, far.clamp(max=half - 1))].permute(2, 0, 1)[None]


def t5_encode(w: Mapping[str, Tensor], ids: Tensor, mask: Tensor, layers: int) -> Tensor:
    """Compute UMT5's embeddings [B, L, D] of token ids [B, L]; each layer has its own position bias."""
    x = w["token_embedding.weight"][ids]
    for layer in range(layers):
        p = f"blocks.{layer}."
        y, table = t5_norm(x, w[f"{p}norm1.weight"]), w[f"{p}pos_embedding.embedding.weight"]
        q, k, v = (
            (y @ w[f"{p}attn.{part}.weight"].T).unflatten(-1, (table.shape[1], -1)).transpose(1, 2) for part in "qkv"
        )
        scores = q @ k.transpose(-1, -2) + t5_bias(table, ids.shape[1])
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(x.dtype).min)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{p}attn.o.weight"].T
        y = t5_norm(x, w[f"{p}norm2.weight"])
        gate = F.gelu(y @ w[f"{p}ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (y @ w[f"{p}ffn.fc1.weight"].T * gate) @ w[f"{p}ffn.fc2.weight"].T
    return t5_norm(x, w["norm.weight"])


def clip_encode(w: Mapping[str, Tensor], pixels: Tensor, layers: int, heads: int) -> Tensor:
    """Compute the features that Wan uses of CLIP's image tower: the output of the second-to-last layer, [B, N, D]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    kernel = w["visual.patch_embedding.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.cls_embedding"].expand(len(x), -1, -1), x], 1) + w["visual.pos_embedding"]
    x = norm(x, "visual.pre_norm")
    for layer in range(layers - 1):
        p = f"visual.transformer.{layer}."
        q, k, v = linear(norm(x, f"{p}norm1"), f"{p}attn.to_qkv").unflatten(-1, (3, heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + linear(y.transpose(1, 2).flatten(2), f"{p}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{p}norm2"), f"{p}mlp.0")), f"{p}mlp.2")
    return x


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _root_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def _rotary_embedding(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Apply rotary embeddings to queries or keys [B, N, heads, D], by the token's frame, row and column."""
    third = 2 * (x.shape[-1] // 6)
    angles = []
    for axis, (length, size) in enumerate(zip(grid, (x.shape[-1] - 2 * third, third, third), strict=True)):
        angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
        shape = [1, 1, 1, size // 2]
        shape[axis] = length
        angles.append(angle.reshape(shape).expand(*grid, size // 2))
    angle = torch.cat(angles, -1).reshape(1, -1, 1, x.shape[-1] // 2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(
        -2
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    parts = (part if part.ndim == 4 else part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts)).transpose(1, 2).flatten(2)


def wan_block(
    w: Mapping[str, Tensor], p: str, x: Tensor, text: Tensor, image: Tensor | None, e: Tensor, heads: int,
    grid: tuple[int, int, int],
) -> Tensor:  # fmt: skip
    """Compute a block of Wan for tokens x [B, N, C]; e: time modulation [B, 6, C]; p: prefix of the block's names."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (w[f"{p}modulation"] + e).chunk(6, 1)
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
    q, k = (_root_norm(_linear(w, f"{p}self_attn.{n}", y), w[f"{p}self_attn.norm_{n}.weight"]) for n in "qk")
    q, k = (_rotary_embedding(part.unflatten(-1, (heads, -1)), grid) for part in (q, k))
    y = _attend(q, k, _linear(w, f"{p}self_attn.v", y), heads)
    x = x + _linear(w, f"{p}self_attn.o", y) * gate1
    y = F.layer_norm(x, x.shape[-1:], w[f"{p}norm3.weight"], w[f"{p}norm3.bias"], eps=1e-6)
    q = _root_norm(_linear(w, f"{p}cross_attn.q", y), w[f"{p}cross_attn.norm_q.weight"])
    k = _root_norm(_linear(w, f"{p}cross_attn.k", text), w[f"{p}cross_attn.norm_k.weight"])
    y = _attend(q, k, _linear(w, f"{p}cross_attn.v", text), heads)
    if image is not None:
        k = _root_norm(_linear(w, f"{p}cross_attn.k_img", image), w[f"{p}cross_attn.norm_k_img.weight"])
        y = y + _attend(q, k, _linear(w, f"{p}cross_attn.v_img", image), heads)
    x = x + _linear(w, f"{p}cross_attn.o", y)
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
    y = _linear(w, f"{p}ffn.2", F.gelu(_linear(w, f"{p}ffn.0", y), approximate="tanh"))
    return x + y * gate2


def wan_forward(
    w: Mapping[str, Tensor], x: Tensor, t: Tensor, text: Tensor, image: Tensor | None, *, layers: int, heads: int
) -> Tensor:
    """Compute Wan's velocity [B, C, T, H, W] for latents x [B, C', T, H, W] from the published weights.

    Args:
        w: weights by their published names.
        x: latents [B, C', T, H, W].
        t: timesteps [B], 0 to 1000.
        text: text embeddings [B, L, D].
        image: CLIP's features [B, 257, D], for image-to-video models.
        layers: number of blocks.
        heads: number of attention heads.
    """
    kernel = w["patch_embedding.weight"]
    x = F.conv3d(x, kernel, w["patch_embedding.bias"], stride=kernel.shape[2:])
    grid, x = tuple(x.shape[2:]), x.flatten(2).transpose(1, 2)
    half = w["time_embedding.0.weight"].shape[1] // 2
    angle = t[:, None].float() / 10000 ** (torch.arange(half) / half)
    time = _linear(w, "time_embedding.0", torch.cat([angle.cos(), angle.sin()], -1))
    time = _linear(w, "time_embedding.2", F.silu(time))
    e = _linear(w, "time_projection.1", F.silu(time)).unflatten(1, (6, -1))
    text = _linear(w, "text_embedding.2", F.gelu(_linear(w, "text_embedding.0", text), approximate="tanh"))
    if image is not None:
        y = F.layer_norm(image, image.shape[-1:], w["img_emb.proj.0.weight"], w["img_emb.proj.0.bias"])
        y = _linear(w, "img_emb.proj.3", F.gelu(_linear(w, "img_emb.proj.1", y)))
        image = F.layer_norm(y, y.shape[-1:], w["img_emb.proj.4.weight"], w["img_emb.proj.4.bias"])
    for layer in range(layers):
        x = wan_block(w, f"blocks.{layer}.", x, text, image, e, heads, grid)
    shift, scale = (w["head.modulation"] + time[:, None]).chunk(2, 1)
    x = _linear(w, "head.head", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    x = x.unflatten(1, grid).unflatten(-1, (*kernel.shape[2:], -1))  # [B, T, H, W, 1, 2, 2, C]
    return torch.einsum("bthwpqrc->bctphqwr", x).flatten(6, 7).flatten(4, 5).flatten(2, 3)
