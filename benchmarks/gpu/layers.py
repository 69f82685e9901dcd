"""Cases of gpu.py: upper bounds of the device, attention by backend, and single blocks of the transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch.utils.checkpoint import checkpoint

from gpu.scales import GIB, HALF, JOINT_TEXT, TERA, TEXT, Case, Scale, Values, nothing, peak_of, synchronize, timed
from videox.estimate.flops import Network, cross_attention_network, joint_attention_network
from videox.models.norm_dtype import keep_norm_dtype
from videox.shapes import Bucket, latent_shape, token_count

CUDNN = "_native_cudnn"
NATIVE = ("native", "_native_flash", CUDNN, "_native_efficient")  # kernels that come with torch
INSTALLED = ("_flash_3", "flash", "xformers")  # separate packages


# -------------------------------------------------------------------------------------------------------- ceilings


def matrix_product(shape: tuple[int, int, int], seconds: float, device: torch.device) -> Values:
    """Measure the product of bfloat16 matrices [m, k] x [k, n]."""
    m, k, n = shape
    left, right = (torch.randn(size, device=device, dtype=HALF) for size in ((m, k), (k, n)))
    taken = timed(lambda: left @ right, device, seconds)
    return {"ms": taken * 1e3, "TFLOP/s": 2 * m * k * n / TERA / taken}


def copy(size: int, seconds: float, device: torch.device) -> Values:
    """Measure a copy within the device's memory; TB/s counts bytes read and bytes written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    taken = timed(lambda: target.copy_(source), device, seconds)
    return {"ms": taken * 1e3, "TB/s": 2 * size / TERA / taken}


def ceilings(scale: Scale) -> Iterator[Case]:
    """Yield matrix products and a copy, the upper bounds for everything else."""
    for shape in scale.matrices:
        m, k, n = shape
        words = (f"bf16 matrix product, {m} x {k} x {n}",)
        predict = partial(dict, TFLOP=2 * m * k * n / TERA)
        yield Case("ceilings", words, scale.budget, predict, partial(matrix_product, shape, scale.seconds))
    words = (f"copy of {scale.copied / GIB:.3g} GiB within the device",)
    yield Case("ceilings", words, scale.budget, nothing, partial(copy, scale.copied, scale.seconds))


# ------------------------------------------------------------------------------------------------------- attention


def attend(
    heads: int, head_dim: int, tokens: int, masked: int, backend: str, seconds: float, device: torch.device
) -> Values:
    """Measure self-attention as the models call it, forward and backward, in bfloat16.

    masked: number of last tokens that a boolean mask hides; 0: no mask.
    """
    shape = (1, tokens, heads, head_dim)
    inputs = [torch.randn(shape, device=device, dtype=HALF, requires_grad=True) for _ in range(3)]
    gradient, mask = torch.randn(shape, device=device, dtype=HALF), None
    if masked:
        mask = (torch.arange(tokens, device=device) < tokens - masked)[None, None, None]

    def forward() -> torch.Tensor:
        return dispatch_attention_fn(*inputs, attn_mask=mask)

    with attention_backend(backend):
        alone = timed(forward, device, seconds)
        both = timed(lambda: torch.autograd.grad(forward(), inputs, gradient), device, seconds)
    operations = 4 * tokens * tokens * heads * head_dim / TERA
    backward = max(both - alone, 1e-9)
    return {
        "forward ms": alone * 1e3, "TFLOP/s": operations / alone,
        "backward ms": backward * 1e3, "backward TFLOP/s": 2 * operations / backward,
    }  # fmt: skip


def attention(scale: Scale) -> Iterator[Case]:
    """Yield every backend at every width and size; for HunyuanVideo with and without its mask."""
    kinds = [(name, config, 0, 0) for name, config in scale.wan.items()]
    kinds += [("HunyuanVideo", scale.hunyuan, JOINT_TEXT, masked) for masked in (0, JOINT_TEXT // 2)]
    for name, config, text, masked in kinds:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        for bucket in scale.sizes.values():
            tokens = token_count(bucket) + text
            installed = INSTALLED if bucket == scale.sizes[scale.usual] and not masked else ()
            for backend in (*NATIVE, *installed):
                words = (name, f"{heads} x {head_dim}", f"{tokens:,}", "text" if masked else "none", backend)
                predict = partial(dict, {"forward TFLOP": 4 * tokens * tokens * heads * head_dim / TERA})
                measure = partial(attend, heads, head_dim, tokens, masked, backend, scale.seconds)
                yield Case("attention", words, scale.budget, predict, measure)


# ---------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Repeated:
    """A block of a real class with its inputs; trained: the tensors that the backward pass computes gradients for."""

    module: torch.nn.Module
    inputs: tuple[Any, ...]
    trained: list[torch.Tensor]


def wan_block(config: Mapping[str, Any], bucket: Bucket, device: torch.device) -> Repeated:
    """Return a block of Wan2.1 with float32 weights, as in training."""
    with torch.device(device):
        model = WanTransformer3DModel(**{**config, "num_layers": 1})
    keep_norm_dtype(model, device)
    dim, tokens = config["num_attention_heads"] * config["attention_head_dim"], token_count(bucket)
    given = [
        torch.randn(shape, device=device, dtype=HALF, requires_grad=True)
        for shape in ((1, tokens, dim), (1, TEXT, dim), (1, 6, dim))
    ]
    rope = model.rope(torch.empty(1, 16, *latent_shape(bucket), device=device))
    return Repeated(model.blocks[0], (*given, rope), [*model.blocks[0].parameters(), *given])


def hunyuan_block(
    config: Mapping[str, Any], single: bool, masked: bool, bucket: Bucket, device: torch.device
) -> Repeated:
    """Return a block of HunyuanVideo, with two streams or one, with or without a mask over padded text."""
    with torch.device(device):
        model = HunyuanVideoTransformer3DModel(
            **{**config, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
        )
    keep_norm_dtype(model, device)
    dim, tokens = config["num_attention_heads"] * config["attention_head_dim"], token_count(bucket)
    given = [
        torch.randn(shape, device=device, dtype=HALF, requires_grad=True)
        for shape in ((1, tokens, dim), (1, JOINT_TEXT, dim), (1, dim))
    ]
    mask = (torch.arange(tokens + JOINT_TEXT, device=device) < tokens + JOINT_TEXT // 2)[None, None, None]
    rope = model.rope(torch.empty(1, 16, *latent_shape(bucket), device=device))
    block = (model.single_transformer_blocks if single else model.transformer_blocks)[0]
    return Repeated(block, (*given, mask if masked else None, rope), [*block.parameters(), *given])


def run_block(
    make: Callable[[torch.device], Repeated], how: str, backend: str, seconds: float, device: torch.device
) -> Values:
    """Measure a block's forward and backward pass under autocast to bfloat16, as in train.py.

    how: eager | recomputed | compiled; backend: attention backend, named as in diffusers.
    """
    with attention_backend(backend):
        return run_as(make, how, seconds, device)


def run_as(make: Callable[[torch.device], Repeated], how: str, seconds: float, device: torch.device) -> Values:
    """Like run_block, with the current attention backend."""
    made = make(device)
    module = torch.compile(made.module) if how == "compiled" else made.module
    if how == "recomputed":
        module = partial(checkpoint, made.module, use_reentrant=False)

    def forward() -> list[torch.Tensor]:
        with torch.autocast(device.type, HALF):
            outputs = module(*made.inputs)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    def both() -> None:
        outputs = forward()
        gradients = [torch.ones_like(output) for output in outputs]
        torch.autograd.grad(outputs, made.trained, gradients, allow_unused=True)

    def fresh_pass() -> None:
        nonlocal made, module
        made = make(device)
        module = partial(checkpoint, made.module, use_reentrant=False) if how == "recomputed" else made.module
        both()

    begun = time.perf_counter()
    both()
    synchronize(device)
    values = {"first call s": time.perf_counter() - begun} if how == "compiled" else {}
    values["forward ms"] = timed(forward, device, seconds) * 1e3
    values["forward + backward ms"] = timed(both, device, seconds) * 1e3
    if device.type == "cuda" or how != "compiled":  # on the CPU, tensors inside compiled code cannot be tracked
        made = None
        values["peak GiB"] = peak_of(fresh_pass, device)
    return values


def wan_network(config: Mapping[str, Any], layers: int) -> Network:
    """Return the estimate of a Wan2.1 with `layers` layers."""
    return cross_attention_network({**config, "num_layers": layers}, text_tokens=TEXT, image_tokens=0, half=True)


def of_block(network: Network, number: int, bucket: Bucket) -> Values:
    """Return the predictions for a block: operations of both passes, and the memory kept between them."""
    block, tokens = network.blocks[number], token_count(bucket)
    return {"TFLOP": 3 * block.forward(tokens) / TERA, "kept GiB": block.saved(tokens) / GIB}


def blocks(scale: Scale) -> Iterator[Case]:
    """Yield each kind of block: eager at every size; recomputed, with cuDNN's attention, and compiled at one size."""
    kinds: list[tuple[str, Callable[..., Repeated], Network, int]] = [
        (name, partial(wan_block, config), wan_network(config, 1), 0) for name, config in scale.wan.items()
    ]
    joint = joint_attention_network(
        {**scale.hunyuan, "num_layers": 1, "num_single_layers": 1}, text_tokens=JOINT_TEXT, half=True
    )
    for title, single in (("two streams", False), ("one stream", True)):
        for ending, masked in (("", False), (", masked", True)):
            make = partial(hunyuan_block, scale.hunyuan, single, masked)
            kinds.append((f"HunyuanVideo, {title}{ending}", make, joint, int(single)))
    usual = [("eager", "native"), ("recomputed", "native"), ("eager", CUDNN)]
    ways = [(scale.usual, *way) for way in usual]
    ways += [(size, "eager", "native") for size in scale.sizes if size != scale.usual]
    for size, how, backend in [*ways, (scale.usual, "compiled", "native")]:  # compiled ones last: they take longest
        for name, make, network, number in kinds:
            if "masked" in name and (size, how, backend) != ways[0]:
                continue
            bucket = scale.sizes[size]
            budget = scale.budget * (4 if how == "compiled" else 1)
            measure = partial(run_block, partial(make, bucket), how, backend, scale.seconds)
            words = (name, size, f"{token_count(bucket):,}", how, backend)
            yield Case("blocks", words, budget, partial(of_block, network, number, bucket), measure)
