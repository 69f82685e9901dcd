"""Measurements of the checks of gpu.py that need one process: kernels, dtypes, memory of the allocator, graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from gpu.full_step import (
    FULL,
    Flag,
    fastest,
    forward_backward,
    inputs_of,
    network_of,
    place,
    planned_rates,
    shallow,
)
from gpu.models import convolutions, in_host_memory, text_encoder
from gpu.scales import GIB, HALF, NotRunError, Scale, Values, synchronize, timed
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import encode_moments
from videox.estimate.peak_memory import module_bytes
from videox.estimate.step_time import LAUNCHES_PER_BLOCK
from videox.models.activation_checkpoint import Recompute
from videox.models.norm_dtype import NORMS, keep_norm_dtype
from videox.optim.build import make_optimizer
from videox.shapes import Bucket
from videox.training.gpu_facts import HEAD_DIM, KERNELS, TOKENS, attention_kernel

PRECISIONS = (("fp32", torch.float32, "without TF32"), ("TF32", torch.float32, ""), ("bf16", HALF, ""))
LENGTHS = (23, 41, 58, 77, 95, 120, 133, 158)  # tokens of captions
UNSEEN = 16  # tokens of one more caption, before those that count
TINY = Bucket(1, 32, 32)  # 4 tokens: the time of a step is that of launching its kernels
GRAPHS = {"wan2.1": 1, "hunyuanvideo": 7}  # the most that docs/speed.md allows
SHAPES = 30
# Operators of attention by what gpu_facts calls their kernel.
OPERATORS = {"cudnn": KERNELS["CUDNN_ATTENTION"], "flash": KERNELS["FLASH_ATTENTION"]}
OPERATORS |= {"efficient": KERNELS["EFFICIENT_ATTENTION"], "attention_math": KERNELS["MATH"]}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of a difference, relative to that of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# ------------------------------------------------------------------------------------------------------- encoders


def vae_precisions(family: tuple[str, Any, Mapping[str, Any]], scale: Scale, device: torch.device) -> Values:
    """Measure the encoding of a short clip in float32, with TF32 and in bfloat16: seconds, and errors of the means."""
    _, vae_class, config = family
    with torch.device(device):
        module = vae_class(**config)
        pixels = torch.rand(1, 3, *scale.short) * 2 - 1
    vae, values, expected = OffloadedModule(module, device, offload=False), Values(), None
    for name, dtype, how in PRECISIONS:
        module.to(dtype)
        with convolutions(how):
            means = encode_moments(vae, pixels, mini_batch=1).chunk(2, dim=1)[0]
            values[f"{name} s"] = timed(partial(encode_moments, vae, pixels, mini_batch=1), device, scale.seconds)
        expected = means if expected is None else expected
        values[f"{name} error"] = relative(means, expected)
    return values


def exposed_copy(scale: Scale, device: torch.device) -> Values:
    """Measure what --low_vram adds to the encoding of a caption, with a quarter of the layers of the text encoder."""
    layers = max(scale.umt5["num_layers"] // 4, 1)
    config = {**scale.umt5, "num_layers": layers}
    tokens = torch.ones(1, 64, dtype=torch.long, device=device)

    def seconds(offload: bool) -> float:
        text = OffloadedModule(in_host_memory(config), device, offload=offload)

        def encode() -> None:
            with torch.no_grad(), text.on_device() as module:
                module(tokens)

        return timed(encode, device, scale.seconds)

    size, whole = (module_bytes(text_encoder(each), 2) for each in (config, scale.umt5))
    extra = seconds(True) - seconds(False)
    return {"exposed s": extra * whole / size, "GB": whole / 1e9}


# ------------------------------------------------------------------------------------------------------ attention


def norm_dtypes(config: Mapping[str, Any], bucket: Bucket, device: torch.device) -> Values:
    """Measure two blocks without and with keep_norm_dtype, and return how many norms kept the dtype of the values."""
    model, _ = place(shallow(config), torch.device("cpu"))  # where the norms stay as they are
    model.to(device).enable_gradient_checkpointing()
    given, seen = inputs_of(config, bucket, device), [list[torch.dtype](), list[torch.dtype]()]
    run = partial(forward_backward, model, given, device)
    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2] in NORMS]
    values: Values = {}
    for number, name in enumerate(("before", "after")):
        if number:
            keep_norm_dtype(model, torch.device("cuda"))  # also on a CPU, where training leaves the norms as they are
        hooks = [
            norm.register_forward_hook(lambda *found, n=number: seen[n].append(found[-1].dtype)) for norm in norms
        ]
        run()
        for hook in hooks:
            hook.remove()
        values[f"{name} s"] = fastest(run, device)
        values[f"{name} kept"] = sum(dtype == HALF for dtype in seen[number]) / len(seen[number])
    return values


def text_lengths(config: Mapping[str, Any], tokens: int, multiple: int, device: torch.device) -> Values:
    """Measure joint attention for captions of many lengths, forward and backward: the first time, and later.

    multiple: lengths are rounded up to a multiple of it; a mask hides the padding, if there is any.
    """
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    first, later = [], []
    for length in (UNSEEN, *LENGTHS):
        padded = -(-length // multiple) * multiple
        shape = (1, tokens + padded, heads, width)
        given = [torch.randn(shape, device=device, dtype=HALF, requires_grad=True) for _ in range(3)]
        mask = None
        if padded > length:
            mask = (torch.arange(tokens + padded, device=device) < tokens + length)[None, None, None]
        for times in (first, later):
            synchronize(device)
            begun = time.perf_counter()
            output = dispatch_attention_fn(*given, attn_mask=mask)
            torch.autograd.grad(output, given, torch.ones_like(output))
            synchronize(device)
            times.append(time.perf_counter() - begun)
    count = len(LENGTHS)
    unseen = (sum(first[1:]) - sum(later[1:])) / count
    return {"later s": sum(later[1:]) / count, "unseen s": unseen, "device": device.type}


def kernel_seen(device: torch.device) -> Values:
    """Return the attention kernel that the start of a run prints, and the one that the profiler sees."""
    shape = (1, 1, TOKENS, HEAD_DIM)
    given = [torch.randn(shape, device=device, dtype=HALF, requires_grad=True) for _ in range(3)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        scaled_dot_product_attention(*given).sum().backward()
        synchronize(device)
    operators = [event.key for event in profiler.key_averages() if event.key.startswith("aten::_scaled_dot_product_")]
    seen = next((name for part, name in OPERATORS.items() if any(part in operator for operator in operators)), "none")
    return {"printed": attention_kernel(device, HALF), "seen": seen, "operators": ", ".join(operators)}


# --------------------------------------------------------------------------------------------------------- memory


def reserved(config: Mapping[str, Any], buckets: Sequence[Bucket], device: torch.device) -> Values:
    """Train two blocks with samples of many sizes; return the peak GiB of tensors and of the allocator's segments.

    Whether segments are expandable is decided by the environment of the process.
    """
    model, _ = place(shallow(config), device)
    model.enable_gradient_checkpointing()
    optimizer = make_optimizer(
        [{"params": list(model.parameters())}], learning_rate=1e-5, betas=(0.9, 0.999), weight_decay=0.01, epsilon=1e-8
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for bucket in buckets:
        forward_backward(model, inputs_of(config, bucket, device), device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type != "cuda":
        raise NotRunError("a CPU has no caching allocator")
    return {
        "allocated GiB": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved GiB": torch.cuda.max_memory_reserved(device) / GIB,
    }


def ddp_gradients(config: Mapping[str, Any], bucket: Bucket, view: bool, device: torch.device) -> Values:
    """Train two blocks under DDP with one process; return the GiB of gradients, of their buckets, and the peak.

    view: gradients are views of the buckets in which they are reduced.
    """
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, _ = place(shallow(config), device)
        model.enable_gradient_checkpointing()
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        given = inputs_of(config, bucket, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            wrapped.zero_grad(set_to_none=True)
            forward_backward(wrapped, given, device)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        values: Values = {"gradients": len(gradients), "storages": len(storages)}
        values["gradients GiB"] = sum(gradient.nbytes for gradient in gradients) / GIB
        if device.type == "cuda":
            values["peak GiB"] = torch.cuda.max_memory_allocated(device) / GIB
        return values
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------- launches and compilation


def launch_seconds(config: Mapping[str, Any], device: torch.device) -> Values:
    """Measure blocks with 4 tokens, and divide by their operators: seconds per launch of a kernel.

    Returns also the seconds of the launches of the whole model's step, and the tokens whose FLOPs take as long.
    """
    launches = 4 * LAUNCHES_PER_BLOCK  # the forward pass runs twice, and the backward pass launches twice as many
    seconds = []
    for layers in (2, 4):
        model, _ = place({**config, "num_layers": layers}, device)
        model.enable_gradient_checkpointing()
        seconds.append(fastest(partial(forward_backward, model, inputs_of(config, TINY, device), device), device, 8))
    each = (seconds[1] - seconds[0]) / (2 * launches)
    whole = each * launches * config["num_layers"]
    flops = network_of(config).forward_backward_polynomial().linear * 4 / 3
    tokens = whole * planned_rates().matmul / flops
    return {
        "us per launch": each * 1e6,
        "launches": launches * config["num_layers"],
        "whole s": whole,
        "tokens": tokens,
    }


def compiled_graphs(family: str, config: Mapping[str, Any], device: torch.device) -> Values:
    """Train compiled blocks with clips and captions of 30 sizes; return graphs after 2 sizes and all, and gradients.

    The number of graphs depends on the code of a block, not on its width.
    """
    torch._dynamo.reset()
    counters.clear()
    model, blocks = place(config, device)
    flag, notes = Flag(f"{FULL} --compile", Recompute(1.0), compiled=True), list[str]()
    sizes = [Bucket(1 + 4 * (n % 5), 32 + 16 * (n % 3), 32 + 16 * (n // 3 % 4)) for n in range(1, SHAPES + 1)]
    given = [inputs_of(config, bucket, device, text=9 + number % 7) for number, bucket in enumerate(sizes)]

    def gradients(inputs: Values) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        forward_backward(model, inputs, device)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    expected = gradients(given[0])
    flag.apply(model, blocks, notes, device)
    difference, graphs = relative(gradients(given[0]), expected), []
    for inputs in given[1:]:
        gradients(inputs)
        graphs.append(counters["stats"]["unique_graphs"])
    if notes:
        raise RuntimeError(notes[0])
    return {"difference": difference, "after two": graphs[0], "after all": graphs[-1], "most": GRAPHS[family]}
