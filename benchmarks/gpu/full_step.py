"""Cases of gpu.py: a whole training step, extrapolated from a few blocks, and a few blocks with each flag of speed."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from gpu.scales import GIB, HALF, JOINT_TEXT, TEXT, Case, Scale, Values, peak_of, synchronize
from videox.estimate.flops import Network, cross_attention_network, joint_attention_network
from videox.estimate.gpus import GPUS, gpu_of_device
from videox.estimate.memory import MemorySetup, Parameters
from videox.estimate.mfu import peak_of as gpu_peak
from videox.estimate.rates import Rates, rates_of
from videox.estimate.step_time import StepModel
from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.activation_offload import HostOffload
from videox.models.compiled_blocks import compile_blocks
from videox.models.norm_dtype import keep_norm_dtype
from videox.models.recompute import COPIES_ON_DEVICE, Recompute
from videox.optim.build import make_optimizer
from videox.shapes import Bucket, latent_shape, token_count

ROOT = Path(__file__).resolve().parents[2]
FULL = "--gradient_checkpointing"
DEPTHS = ("num_layers", "num_single_layers")  # of repeated blocks, by kind
NOISE = "more blocks did not take longer"
STEPS = 3  # of a measurement; the first one is not counted


# ---------------------------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class Flag:
    """Flags of speed and activation memory, and how a model gets them."""

    flags: str
    recompute: Recompute
    offload: bool = False
    compiled: bool = False

    def apply(
        self,
        model: Any,  # noqa: ANN401 - of diffusers
        blocks: Sequence[nn.Module],
        notes: list[str],
        device: torch.device,
    ) -> HostOffload | None:
        """Set a model up, and return its offload, if any."""
        offload = HostOffload(device) if self.offload else None
        checkpoint_blocks(model, blocks, lambda *_: self.recompute, offload)
        if self.compiled:
            compile_blocks(blocks, notes.append)
        return offload


FLAGS = (
    Flag("none", Recompute()),
    Flag(FULL, Recompute(1.0)),
    Flag(f"{FULL} --gradient_checkpointing_keep attention", Recompute(1.0, "attention")),
    Flag(f"{FULL} --gradient_checkpointing_keep self_attention", Recompute(1.0, "self_attention")),
    Flag(f"{FULL} --offload_activations", Recompute(1.0), offload=True),
    Flag(f"{FULL} --compile", Recompute(1.0), compiled=True),
    Flag(f"{FULL} --gradient_checkpointing_keep attention --compile", Recompute(1.0, "attention"), compiled=True),
)
EVERY_BLOCK = FLAGS[1]


# ------------------------------------------------------------------------------------------------------- computed


def network_of(config: Mapping[str, Any]) -> Network:
    """Return the estimate's model of a transformer, with weights as DDP has them."""
    if "num_single_layers" in config:
        return joint_attention_network(config, text_tokens=JOINT_TEXT, half=True)
    return cross_attention_network(config, text_tokens=TEXT, image_tokens=0, half=True)


@dataclass(frozen=True)
class Computed:
    """A step with a flag on a GPU: seconds, MFU, GiB of activations on the GPU and of inputs on the host."""

    seconds: float
    mfu: float
    activations: float
    host: float


def parameters_of(config: Mapping[str, Any]) -> Parameters:
    """Return the numbers of parameters of a transformer that is trained as a whole."""
    with torch.device("meta"):
        model, blocks = build(config)
    total, *sizes = (sum(p.numel() for p in module.parameters()) for module in (model, *blocks))
    return Parameters(total, total, max(sizes), total - sum(sizes))


def compute(
    config: Mapping[str, Any], bucket: Bucket, flags: Sequence[Flag], gpu: str, *, optimizer: bool = True
) -> list[Computed]:
    """Return the step of each flag as the dry run computes it, for one sample on one GPU.

    Args:
        config: of the transformer.
        bucket: of the sample.
        flags: what is computed.
        gpu: a key of GPUS.
        optimizer: with a step of AdamW.
    """
    network, tokens, parameters = network_of(config), token_count(bucket), parameters_of(config)
    found = []
    for flag in flags:
        recomputed = range(len(network.blocks)) if flag.recompute.share else ()
        setup = MemorySetup(
            "single", 1, 1, True, flag.recompute.share, False, 0, tokens, 1, {}, keep=flag.recompute.keep,
            offload_activations=flag.offload,
        )  # fmt: skip
        model = StepModel(network, parameters, setup, rates_of(GPUS[gpu], gpu), flag.compiled)
        seconds = model.micro_batch(1, tokens, recomputed, flag.recompute.keep).total()
        seconds += model.optimizer_step(0).total() if optimizer else 0.0
        host = network.offloaded_bytes(tokens, recomputed) if flag.offload else []
        device = network.peak_bytes(tokens, recomputed, flag.recompute.keep) - sum(sorted(host)[:-COPIES_ON_DEVICE])
        mfu = network.forward_backward(tokens) / seconds / model.rates.peak
        found.append(Computed(seconds, mfu, device / GIB, sum(host) / GIB))
    return found


def predict_step(config: Mapping[str, Any], bucket: Bucket) -> Values:
    """Predict the step of a whole model with every block recomputed."""
    (found,) = compute(config, bucket, [EVERY_BLOCK], planned_gpu())
    return {"predicted s": found.seconds, "predicted MFU %": 100 * found.mfu}


def predict_flag(config: Mapping[str, Any], bucket: Bucket, flag: Flag) -> Values:
    """Predict forward and backward pass of a model with a flag: seconds, and the GiB that they add to the weights.

    These are activations, gradients, and the copies of the weights in the compute dtype.
    """
    (found,) = compute(config, bucket, [flag], planned_gpu(), optimizer=False)
    weights = parameters_of(config).total
    return {"predicted s": found.seconds, "predicted GiB": found.activations + weights * (4 + HALF.itemsize) / GIB}


def planned_gpu() -> str:
    """Return the key in GPUS of the GPU here; that of an H100 without one, or for an unknown one."""
    gpu = gpu_of_device(device_name())
    return next((name for name, known in GPUS.items() if known == gpu), "h100")


def planned_rates() -> Rates:
    """Return the assumed rates of `planned_gpu`."""
    return rates_of(GPUS[planned_gpu()], planned_gpu())


def device_name() -> str:
    """Return the name of the GPU, "" without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


# ------------------------------------------------------------------------------------------------------- measured


def build(config: Mapping[str, Any]) -> tuple[Any, list[nn.Module]]:
    """Return a transformer in training on the current device, and its repeated blocks, in order."""
    if "num_single_layers" not in config:
        model = WanTransformer3DModel(**config).train()
        return model, list(model.blocks)
    model = HunyuanVideoTransformer3DModel(**config).train()
    return model, [*model.transformer_blocks, *model.single_transformer_blocks]


@cache
def hunyuan_script() -> ModuleType:
    """Return scripts/hunyuanvideo/train.py as a module."""
    path = ROOT / "scripts/hunyuanvideo/train.py"
    spec = importlib.util.spec_from_file_location("gpu_hunyuan_train", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before execution: dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


def place(config: Mapping[str, Any], device: torch.device) -> tuple[Any, list[nn.Module]]:
    """Return a float32 transformer on a device, with norms and attention as in training, and its blocks."""
    with torch.device(device):
        model, blocks = build(config)
    keep_norm_dtype(model, device)
    if "num_single_layers" in config:
        attention = hunyuan_script().MaskFreeAttention()
        attention.all_real = True
        for block in blocks:
            block.attn.set_processor(attention)
    return model, blocks


def inputs_of(config: Mapping[str, Any], bucket: Bucket, device: torch.device, text: int | None = None) -> Values:
    """Return the keywords of one sample; text: its tokens (None = as many as the model takes)."""
    joint = "num_single_layers" in config
    tokens, width = text or (JOINT_TEXT if joint else TEXT), config["text_embed_dim" if joint else "text_dim"]
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, config["in_channels"], *latent_shape(bucket), device=device),
        "timestep": torch.full((1,), 500.0, device=device), "return_dict": False,
        "encoder_hidden_states": torch.randn(1, tokens, width, device=device, dtype=HALF),
    }  # fmt: skip
    if joint:
        pooled = torch.randn(1, config["pooled_projection_dim"], device=device, dtype=HALF)
        given |= {"encoder_attention_mask": torch.ones(1, tokens, device=device), "pooled_projections": pooled}
        given["guidance"] = torch.full((1,), 6000.0, device=device)
    return given


def forward_backward(model: Any, given: Values, device: torch.device) -> torch.Tensor:  # noqa: ANN401 - of diffusers
    """Run both passes under autocast to bfloat16, and return the loss."""
    with torch.autocast(device.type, HALF):
        prediction = model(**given)[0]
    loss = torch.nn.functional.mse_loss(prediction.float(), given["hidden_states"])
    loss.backward()
    return loss.detach()


def fastest(run: Callable[[], object], device: torch.device, repeats: int = STEPS) -> float:
    """Return the shortest time of a call in seconds; the first one is not counted."""
    taken = []
    for _ in range(repeats):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def full_step(config: Mapping[str, Any], bucket: Bucket, device: torch.device) -> float:
    """Return the seconds of a step: both passes with every block recomputed, and fused AdamW on float32 weights."""
    model, _ = place(config, device)
    model.enable_gradient_checkpointing()
    optimizer = make_optimizer(
        [{"params": list(model.parameters())}], learning_rate=1e-5, betas=(0.9, 0.999), weight_decay=0.01, epsilon=1e-8
    )
    given = inputs_of(config, bucket, device)

    def train() -> None:
        forward_backward(model, given, device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return fastest(train, device)


def depths_of(config: Mapping[str, Any]) -> list[dict[str, int]]:
    """Return the depths at which a model is measured: a small one, and one larger in each kind of blocks."""
    if "num_single_layers" in config:
        return [dict(zip(DEPTHS, counts, strict=True)) for counts in ((1, 1), (2, 1), (1, 2))]
    return [{"num_layers": 2}, {"num_layers": 4}]


def extrapolate(config: Mapping[str, Any], seconds: Sequence[float]) -> float:
    """Return the seconds of the whole model: linear in the number of blocks of each kind.

    Args:
        config: of the whole model.
        seconds: at each of depths_of.

    Raises:
        RuntimeError: more blocks did not take longer, as on a machine that is busy with something else.
    """
    if min(seconds[1:]) <= seconds[0]:
        raise RuntimeError(f"{NOISE}: {', '.join(f'{each:.3g}' for each in seconds)} s")
    small, *larger = depths_of(config)
    total = seconds[0]
    for depths, taken in zip(larger, seconds[1:], strict=True):
        (kind,) = (name for name in depths if depths[name] != small[name])
        total += (taken - seconds[0]) / (depths[kind] - small[kind]) * (config[kind] - small[kind])
    return total


def measure_step(config: Mapping[str, Any], bucket: Bucket, device: torch.device) -> Values:
    """Measure a few blocks, and extrapolate to all of them; MFU counts the model's own FLOPs."""
    seconds = extrapolate(config, [full_step({**config, **depths}, bucket, device) for depths in depths_of(config)])
    flops = network_of(config).forward_backward(token_count(bucket))
    peak = gpu_peak(device_name()) or planned_rates().peak
    return {"step s": seconds, "MFU %": 100 * flops / seconds / peak}


def measure_flag(config: Mapping[str, Any], bucket: Bucket, flag: Flag, device: torch.device) -> Values:
    """Measure forward and backward pass of a few blocks with a flag: seconds, and GiB in addition to the weights."""
    model, blocks = place(config, device)
    notes: list[str] = []
    offload = flag.apply(model, blocks, notes, device)
    given = inputs_of(config, bucket, device)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        forward_backward(model, given, device)

    values: Values = {"step s": fastest(both, device)}
    if notes:
        raise RuntimeError(notes[0])
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        values["peak GiB"] = peak_of(both, device)
    if offload is not None:
        values["on the host GiB"] = offload.moved_bytes / GIB / (STEPS + (device.type == "cuda"))
    return values


# ---------------------------------------------------------------------------------------------------------- cases


def models_of(scale: Scale) -> dict[str, Mapping[str, Any]]:
    """Return the configurations of the transformers by name, the largest first: its figures are compared most."""
    return {**dict(reversed(scale.wan.items())), "HunyuanVideo": scale.hunyuan}


def step(scale: Scale) -> Iterator[Case]:
    """Yield the whole step of each model, at the sizes of published figures."""
    for name, config in models_of(scale).items():
        sizes = list(scale.steps.items())
        for size, bucket in sizes[1:] if "num_single_layers" in config else sizes:
            words = (name, size, f"{token_count(bucket):,}")
            predict, measure = partial(predict_step, config, bucket), partial(measure_step, config, bucket)
            yield Case("step", words, scale.budget * 2, predict, measure)


def shallow(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with two blocks."""
    return {
        **config,
        **({"num_layers": 1, "num_single_layers": 1} if "num_single_layers" in config else {"num_layers": 2}),
    }


def flags(scale: Scale) -> Iterator[Case]:
    """Yield two blocks of each model with each flag; the compiled ones last, since compilation takes longest."""
    size, bucket = next(iter(scale.steps.items()))
    for compiled in (False, True):
        for name, config in models_of(scale).items():
            for flag in FLAGS:
                if flag.compiled == compiled:
                    given = (shallow(config), bucket, flag)
                    predict, measure = partial(predict_flag, *given), partial(measure_flag, *given)
                    yield Case(
                        "flags", (name, size, flag.flags), scale.budget * (4 if compiled else 1), predict, measure
                    )
