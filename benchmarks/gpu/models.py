"""Cases of gpu.py: frozen encoders, transfers to the device, and the memory of full fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from gpu.layers import wan_network
from gpu.scales import GIB, HALF, LARGEST, TERA, TEXT, Case, Scale, Values, nothing, peak_of, synchronize, timed
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import encode_moments
from videox.estimate.memory import Encoders, Memory, MemorySetup, Parameters, memory_of
from videox.estimate.peak_memory import module_bytes, peak_bytes
from videox.models.norm_dtype import keep_norm_dtype
from videox.optim.build import make_optimizer
from videox.shapes import Bucket, latent_shape, token_count

# -------------------------------------------------------------------------------------------------------- encoders


@cache
def counted(vae_class: Any, config: tuple[tuple[str, Any], ...], bucket: Bucket) -> tuple[float, float]:  # noqa: ANN401
    """Return the operations of a VAE's encoder and its peak bytes in float32, from tensors without data."""
    with torch.device("meta"):
        vae, pixels = vae_class(**dict(config)).eval(), torch.empty(1, 3, *bucket)
    with FlopCounterMode(display=False) as counter:
        held = peak_bytes(lambda: vae.encode(pixels).latent_dist.parameters)
    return counter.get_total_flops(), held


def predict_encode(vae_class: Any, config: Mapping[str, Any], size: int, bucket: Bucket) -> Values:  # noqa: ANN401
    """Predict operations and memory of a VAE's encoder, for elements of `size` bytes."""
    operations, held = counted(vae_class, tuple(config.items()), bucket)
    return {"TFLOP": operations / TERA, "predicted GiB": held * size / 4 / GIB}


@contextmanager
def convolutions(how: str) -> Iterator[None]:
    """Set how cuDNN computes inside: "" as torch has it (float32 in TF32), "without TF32", or "cudnn.benchmark"."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = before[0] and how != "without TF32"
    torch.backends.cudnn.benchmark = how == "cudnn.benchmark"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def encode_clip(
    family: tuple[str, Any, Mapping[str, Any]],
    dtype: torch.dtype,
    how: str,
    bucket: Bucket,
    seconds: float,
    device: torch.device,
) -> Values:
    """Measure the encoding of one clip, as train.py calls it; how: for convolutions, or "channels_last_3d"."""
    _, vae_class, config = family
    with torch.device(device):
        module = vae_class(**config).to(dtype)
        pixels = torch.rand(1, 3, *bucket, dtype=dtype) * 2 - 1
    if how == "channels_last_3d":
        pixels = pixels.to(memory_format=torch.channels_last_3d)
        for weight in module.parameters():
            if weight.ndim == 5:  # the Wan VAE has two-dimensional convolutions too, whose weights have no such format
                weight.data = weight.data.to(memory_format=torch.channels_last_3d)
    run = partial(encode_moments, OffloadedModule(module, device, offload=False), pixels, mini_batch=1)
    with convolutions(how):
        return {"ms": timed(run, device, seconds) * 1e3, "peak GiB": peak_of(run, device)}


def vae_classes(scale: Scale) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """Return name, class and configuration of the VAE of both families."""
    return [
        ("Wan2.1", AutoencoderKLWan, scale.wan_vae),
        ("HunyuanVideo", AutoencoderKLHunyuanVideo, scale.hunyuan_vae),
    ]


def vae(scale: Scale) -> Iterator[Case]:
    """Yield the VAE of both families: as in training (float32, TF32 for convolutions), in bfloat16, and otherwise.

    What is no default of train.py is measured with a short clip, since it may be slow.
    """
    sizes = [scale.usual, *(size for size in list(scale.sizes)[:2] if size != scale.usual)]
    short = "x".join(map(str, scale.short))
    ways = [(dtype, "", size, scale.sizes[size]) for size in sizes for dtype in (torch.float32, HALF)]
    ways += [
        (torch.float32, how, short, scale.short) for how in ("", "without TF32", "cudnn.benchmark", "channels_last_3d")
    ]
    for dtype, how, size, bucket in ways:
        for family in vae_classes(scale):
            precision = str(dtype).removeprefix("torch.")
            words = (family[0], size, f"{precision}, {how}" if how else precision)
            predict = partial(predict_encode, *family[1:], dtype.itemsize, bucket)
            measure = partial(encode_clip, family, dtype, how, bucket, scale.seconds)
            yield Case("vae", words, scale.budget * 2, predict, measure)


# ------------------------------------------------------------------------------------------------------- transfers


def text_encoder(config: Mapping[str, Any]) -> UMT5EncoderModel:
    """Return a UMT5 in bfloat16 on the meta device."""
    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config(**config)).to(HALF).eval()


def in_host_memory(config: Mapping[str, Any]) -> UMT5EncoderModel:
    """Return a UMT5 with its weights in pageable host memory; all pages are allocated."""
    module = text_encoder(config).to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()
    return module


def rated(size: float, taken: float, device: torch.device) -> Values:
    """Return the columns of a transfer of `size` bytes; on the CPU there is no transfer and therefore no GB/s."""
    return {"s": taken} if device.type == "cpu" else {"s": taken, "GB/s": size / 1e9 / taken}


def move_pageable(config: Mapping[str, Any], back: bool, device: torch.device) -> Values:
    """Measure module.to(device), or with `back` module.to("cpu")."""
    module, size = in_host_memory(config), module_bytes(text_encoder(config), 2)
    if back:
        module.to(device)
    synchronize(device)
    begun = time.perf_counter()
    module.to("cpu" if back else device)
    synchronize(device)
    return rated(size, time.perf_counter() - begun, device)


def move_pinned(config: Mapping[str, Any], seconds: float, device: torch.device) -> Values:
    """Measure what --low_vram does for each use: copy all weights from pinned memory, then drop the copies."""
    size = module_bytes(text_encoder(config), 2)
    begun = time.perf_counter()
    offloaded = OffloadedModule(in_host_memory(config), device, offload=True)
    once = time.perf_counter() - begun

    def load() -> None:
        with offloaded.on_device():
            synchronize(device)

    return {**rated(size, timed(load, device, seconds), device), "once s": once}


def encode_text(config: Mapping[str, Any], seconds: float, device: torch.device) -> Values:
    """Measure the encoding of one prompt of TEXT tokens."""
    module = text_encoder(config).to_empty(device=device)
    for tensor in module.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    tokens = torch.ones(1, TEXT, dtype=torch.long, device=device)
    with torch.no_grad():
        return {"s": timed(lambda: module(tokens).last_hidden_state, device, seconds)}


def move_pixels(bucket: Bucket, dtype: torch.dtype, pinned: bool, seconds: float, device: torch.device) -> Values:
    """Measure the copy of one clip's pixels to the device."""
    pixels = torch.zeros(1, bucket.frames, bucket.height, bucket.width, 3, dtype=dtype)
    if pinned and device.type == "cuda":
        pixels = pixels.pin_memory()
    run = partial(pixels.to, device, non_blocking=pinned, copy=True)
    return rated(pixels.numel() * dtype.itemsize, timed(run, device, seconds), device)


def transfers(scale: Scale) -> Iterator[Case]:
    """Yield transfers of the text encoder, the encoding of a prompt, and transfers of a clip's pixels."""
    config, bucket = scale.umt5, scale.sizes[scale.usual]

    def size() -> Values:
        return {"GB": module_bytes(text_encoder(config), 2) / 1e9}

    rows: list[tuple[str, Callable[[], Values], Callable[[torch.device], Values]]] = [
        ("text encoder, pageable, to the device", size, partial(move_pageable, config, False)),
        ("text encoder, pageable, back to the host", size, partial(move_pageable, config, True)),
        ("text encoder, pinned, as --low_vram", size, partial(move_pinned, config, scale.seconds)),
        (f"text encoder, encoding one prompt of {TEXT} tokens", nothing, partial(encode_text, config, scale.seconds)),
    ]
    for dtype, pinned, words in ((torch.uint8, True, "uint8, pinned"), (torch.float32, False, "float32, pageable")):
        known = partial(dict, GB=3 * bucket.frames * bucket.height * bucket.width * dtype.itemsize / 1e9)
        rows.append((f"pixels of a clip, {words}", known, partial(move_pixels, bucket, dtype, pinned, scale.seconds)))
    for words, predict, measure in rows:
        yield Case("transfers", (words,), scale.budget * 2, predict, measure)


# ---------------------------------------------------------------------------------------------------------- memory


@cache
def parameters_of(config: tuple[tuple[str, Any], ...], layers: int) -> Parameters:
    """Count the parameters of a Wan2.1 with `layers` layers, all of them trainable."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**dict(config), "num_layers": layers})
    total, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks[0]))
    return Parameters(total, total, block, total - layers * block)


def predicted_memory(config: Mapping[str, Any], layers: int, bucket: Bucket, setup: MemorySetup) -> Memory:
    """Return the estimate of videox/estimate/memory.py for full fine-tuning with `layers` layers."""
    parameters = parameters_of(tuple(config.items()), layers)
    network = wan_network(config, layers)
    return memory_of(parameters, network, Encoders({}, 0.0), replace(setup, tokens=token_count(bucket)))


ONE_GPU = MemorySetup(
    backend="single", processes=1, per_host=1, half=True, recompute_share=1.0, offload_encoders=False, workers=0, tokens=0, batch=1, zero={}
)  # fmt: skip


def of_tensors(memory: Memory) -> float:
    """Return the GiB of an estimate that the allocator counts: without CUDA context and fragmentation."""
    return (sum(memory.states.values()) + max(sum(phase.values()) for phase in memory.phases.values())) / GIB


def predict_step(config: Mapping[str, Any], layers: int, bucket: Bucket) -> Values:
    """Predict the peak memory of a training step on one GPU."""
    return {"predicted GiB": of_tensors(predicted_memory(config, layers, bucket, ONE_GPU))}


def train_step(config: Mapping[str, Any], layers: int, bucket: Bucket, device: torch.device) -> Values:
    """Measure full fine-tuning: float32 weights, autocast, every block recomputed, AdamW; times the third step."""
    taken = 0.0

    def train() -> None:
        nonlocal taken
        with torch.device(device):
            model = WanTransformer3DModel(**{**config, "num_layers": layers})
            noisy = torch.randn(1, config["in_channels"], *latent_shape(bucket))
            text, timestep = torch.randn(1, TEXT, config["text_dim"], dtype=HALF), torch.full((1,), 500.0)
        keep_norm_dtype(model, device)
        model.enable_gradient_checkpointing()
        optimizer = make_optimizer(
            [{"params": list(model.parameters())}],
            learning_rate=1e-5,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            epsilon=1e-8,
        )
        for _ in range(3):
            begun = time.perf_counter()
            with torch.autocast(device.type, HALF):
                prediction = model(noisy, timestep, text, return_dict=False)[0]
            torch.nn.functional.mse_loss(prediction.float(), noisy).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            taken = time.perf_counter() - begun

    return {"peak GiB": peak_of(train, device), "step s": taken}


def memory(scale: Scale) -> Iterator[Case]:
    """Yield full fine-tuning of the smallest model, and of the largest one truncated to a few of its layers."""
    smallest = next(iter(scale.wan))
    rows = [(LARGEST, size, layers) for size in list(scale.sizes)[-2:] for layers in scale.layers]
    for name, size, layers in [*rows, (smallest, scale.usual, scale.wan[smallest]["num_layers"])]:
        given = (scale.wan[name], layers, scale.sizes[size])
        words = (name, size, str(layers))
        yield Case("memory", words, scale.budget * 2, partial(predict_step, *given), partial(train_step, *given))
