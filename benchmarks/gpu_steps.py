"""Time of a training step on a GPU, computed from what each operator of a block computes and moves; no GPU is needed.

A block of the real class and width runs forward and backward on tensors without data. Matrix products and attention
take their FLOPs at a rate that was measured elsewhere, everything else takes the bytes that it reads and writes at the
bandwidth of the memory. Layers outside of the blocks, the optimizer and the encoders are not part of the time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from gpu_scales import JOINT_TEXT, TEXT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from videox.shapes import Bucket, latent_shape

FORWARD, BACKWARD = "forward", "backward"
VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
    "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "_reshape_alias", "empty", "empty_like",
    "new_empty", "new_empty_strided", "empty_strided",
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches, in FLOPs or bytes per second: assumed from published measurements.

    peak: of the data sheet, for MFU. host: bytes per second between host and GPU.
    """

    matmul: float
    attention: float
    attention_backward: float
    memory: float
    peak: float
    host: float


H100 = Rates(710e12, 520e12, 440e12, 3.0e12, 989e12, 55e9)


@dataclass(frozen=True)
class Pass:
    """One pass of a block: FLOPs of matrix products and attention, bytes of all other operators, and their number.

    self_attention: the part of attention whose keys are as many as its queries. fused: the bytes of all other
    operators if those between two matrix products were one kernel, which reads and writes each tensor once.
    """

    matmul: float
    attention: float
    self_attention: float
    bytes: float
    fused: float
    launches: int


class _Meter(TorchDispatchMode):
    """Records what operators compute and move."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = FORWARD
        self.matmul: defaultdict[str, float] = defaultdict(float)
        self.attention: defaultdict[str, float] = defaultdict(float)
        self.own: defaultdict[str, float] = defaultdict(float)
        self.bytes: defaultdict[str, float] = defaultdict(float)
        self.launches: defaultdict[str, int] = defaultdict(int)
        self.alive: list[Tensor] = []  # so that no address is used twice
        self.made: dict[int, tuple[str, bool]] = {}  # by storage: phase and whether a small operator made it
        self.read: defaultdict[int, set[tuple[str, bool]]] = defaultdict(set)
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, inputs=(), settings=None):  # noqa: ANN001, ANN204 - of torch
        result = function(*inputs, **(settings or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name in VIEWS or function.namespace == "prim":
            return result
        given = [leaf for leaf in pytree.tree_leaves((inputs, settings)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.alive += [*given, *made]
        self.launches[self.phase] += 1
        small = self._count(name, given, made)
        for tensor in given:
            self.read[self._key(tensor)].add((self.phase, small))
        for tensor in made:
            self.made.setdefault(self._key(tensor), (self.phase, small))
        return result

    def _key(self, tensor: Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        self.sizes[key] = max(self.sizes.get(key, 0), _moved(tensor))
        return key

    def _count(self, name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        """Count an operator; return whether it is neither a matrix product nor attention."""
        if "scaled_dot_product" in name:
            backward = "backward" in name
            query, key = given[1 if backward else 0], given[2 if backward else 1]
            flops = (10 if backward else 4) * math.prod(query.shape) * key.shape[-2]
            self.attention[self.phase] += flops
            self.own[self.phase] += flops if query.shape == key.shape else 0
            return False
        if name in ("mm", "addmm", "bmm"):
            left = given[1] if name == "addmm" else given[0]
            self.matmul[self.phase] += 2 * math.prod(made[0].shape) * left.shape[-1]
            return False
        self.bytes[self.phase] += sum(map(_moved, given)) + sum(map(_moved, made))
        return True

    def fused(self, phase: str) -> float:
        """Return the bytes if small operators between others were one kernel: inputs and outputs of these alone."""
        total = 0.0
        for key, size in self.sizes.items():
            made_in, made_small = self.made.get(key, ("", False))
            readers = self.read[key]
            if (phase, True) in readers and not (made_small and made_in == phase):
                total += size  # read once
            if made_small and made_in == phase and (readers - {(phase, True)} or not readers):
                total += size  # written once, for another kernel or the other pass
        return total

    def result(self, phase: str) -> Pass:
        """Return what was recorded in a phase."""
        return Pass(
            self.matmul[phase], self.attention[phase], self.own[phase], self.bytes[phase], self.fused(phase),
            self.launches[phase],
        )  # fmt: skip


def _moved(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory: an expanded one has fewer than its elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _fused_norm(norm: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401 - a norm of torch or diffusers
    """Return a root-mean-square norm as the one kernel that torch has for GPUs."""
    size = [hidden.shape[-1]]
    return torch.ops.aten._fused_rms_norm(hidden, size, norm.weight.to(hidden.dtype), norm.eps)[0]


def trace_blocks(config: Mapping[str, Any], bucket: Bucket) -> list[tuple[int, Pass, Pass]]:
    """Return (number of blocks, forward pass, backward pass) of each kind of block, for one sample.

    Args:
        config: of the transformer, as diffusers has it; the weights are float32, and computation is bfloat16.
        bucket: size of the sample.
    """
    found = []
    joint = "num_single_layers" in config
    few = {**config, "num_layers": 1, **({"num_single_layers": 1, "num_refiner_layers": 1} if joint else {})}
    with FakeTensorMode():
        model: Any = (HunyuanVideoTransformer3DModel if joint else WanTransformer3DModel)(**few).train()
        for module in model.modules():
            if type(module).__name__ == "RMSNorm":
                module.forward = partial(_fused_norm, module)
        kinds = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
        for name, count in (kinds if joint else {"blocks": "num_layers"}).items():
            block = getattr(model, name)[0]
            inputs = _captured_inputs(model, block, config, bucket)
            meter = _Meter()
            with meter, torch.autocast("cpu", torch.bfloat16):
                outputs = block(*inputs)
                outputs = [outputs] if isinstance(outputs, Tensor) else [out for out in outputs if out is not None]
                meter.phase = BACKWARD
                torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
            found.append((config[count], meter.result(FORWARD), meter.result(BACKWARD)))
    return found


def _captured_inputs(
    model: Any,  # noqa: ANN401 - of diffusers
    block: nn.Module,
    config: Mapping[str, Any],
    bucket: Bucket,
) -> tuple[Any, ...]:
    """Return what the model gives to a block, as leaves that need gradients."""
    joint = "num_single_layers" in config
    captured: list[tuple[Any, ...]] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: captured.append(inputs))
    text = JOINT_TEXT if joint else TEXT
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, config["in_channels"], *latent_shape(bucket)), "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, text, config["text_embed_dim" if joint else "text_dim"], dtype=torch.bfloat16),
    }  # fmt: skip
    if joint:
        pooled = torch.randn(1, config["pooled_projection_dim"], dtype=torch.bfloat16)
        given |= {"encoder_attention_mask": torch.ones(1, text), "pooled_projections": pooled}
        given["guidance"] = torch.full((1,), 6000.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**given, return_dict=False)
    hook.remove()
    inputs = list(captured[0])
    if joint:
        inputs[3] = None  # no mask while all text is real
    for position in (0, 1):
        inputs[position] = inputs[position].detach().requires_grad_()
    return tuple(inputs)


@dataclass(frozen=True)
class Variant:
    """How a step runs. recompute: every block runs forward twice; keep: as --gradient_checkpointing_keep."""

    recompute: bool = True
    keep: str = ""
    compiled: bool = False
    offload: bool = False


def step_seconds(blocks: list[tuple[int, Pass, Pass]], variant: Variant, rates: Rates, moved: float = 0.0) -> float:
    """Return the seconds of forward and backward pass of all blocks.

    Args:
        blocks: of trace_blocks.
        variant: how they run.
        rates: of the GPU.
        moved: bytes of a block's input, which variant.offload copies during one block.
    """

    def seconds(part: Pass, attention: float, rate: float) -> float:
        return (
            part.matmul / rates.matmul
            + attention / rate
            + (part.fused if variant.compiled else part.bytes) / rates.memory
        )

    total = 0.0
    for count, forward, backward in blocks:
        once = seconds(forward, forward.attention, rates.attention)
        kept = {"": 0.0, "attention": forward.attention, "self_attention": forward.self_attention}[variant.keep]
        again = seconds(forward, forward.attention - kept, rates.attention) if variant.recompute else 0.0
        exposed = max(moved / rates.host - once, 0.0) if variant.offload else 0.0
        total += count * (once + again + seconds(backward, backward.attention, rates.attention_backward) + 2 * exposed)
    return total
