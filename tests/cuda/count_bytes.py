"""Counts what the small operators of a transformer block read and write under CUDA's autocast, on a fake GPU.

Reads cases from the standard input, a JSON list of [class of diffusers, configuration, latent frames, side of the
latents, text tokens], and prints a JSON list of [bytes of the forward pass, bytes of the backward pass]. guard.cpp
must be loaded before torch (LD_PRELOAD), and its path is the first argument.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import fake_cuda
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videox.models.norm_dtype import keep_norm_dtype

# imported before the GPU is there, because torch would look for more of CUDA
CLASSES = {kind.__name__: kind for kind in (HunyuanVideoTransformer3DModel, WanTransformer3DModel)}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
# that move nothing: memory that is only reserved, and names that are no views by their schema
RESERVED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "alias",
}


class ByteCounter(TorchDispatchMode):
    """Adds the bytes of inputs and outputs of each operator that is no view, matrix product or reservation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and name not in PRODUCTS | RESERVED and not function.is_view:
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if name in ("zero_", "fill_") or (name == "copy_" and read):
                read = read[1:]  # the target of a copy is written only
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in (*read, *written) if leaf.dim() > 1)
        return result


class NoAttention(torch.autograd.Function):
    """Attention that reads and writes nothing, with gradients of the right shapes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def fused_rms_norm(tensor: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """What torch.rms_norm moves on a GPU under autocast: it is one kernel in float32, and several for fake tensors.

    A layer norm reads and writes the same numbers.
    """
    with torch.autocast("cuda", enabled=False):
        weight = weight if weight is None else weight.float()
        return torch.layer_norm(tensor.float(), shape, weight, None, eps or 1e-6)


def no_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return NoAttention.apply(query, key, value)


def inputs_of(name: str, config: dict[str, Any], frames: int, side: int, text: int) -> dict[str, Tensor]:
    cuda = torch.device("cuda")
    shape = (1, config["in_channels"], frames, side, side)
    if name.startswith("Wan"):
        return {
            "hidden_states": torch.empty(shape, device=cuda),
            "timestep": torch.empty(1, dtype=torch.int64, device=cuda),
            "encoder_hidden_states": torch.empty(1, text, config["text_dim"], device=cuda, dtype=torch.bfloat16),
        }
    return {
        "hidden_states": torch.empty(shape, device=cuda),
        "timestep": torch.empty(1, dtype=torch.int64, device=cuda),
        "encoder_hidden_states": torch.empty(1, text, config["text_embed_dim"], device=cuda, dtype=torch.bfloat16),
        "encoder_attention_mask": torch.empty(1, text, dtype=torch.int64, device=cuda),
        "pooled_projections": torch.empty(1, config["pooled_projection_dim"], device=cuda, dtype=torch.bfloat16),
        "guidance": torch.empty(1, device=cuda),
    }


def count(name: str, config: dict[str, Any], frames: int, side: int, text: int) -> list[int]:
    """Return the bytes of a forward and of a backward pass of a transformer."""
    with torch.device("cuda"):
        model = CLASSES[name](**config)
    keep_norm_dtype(model, torch.device("cuda"))
    given = inputs_of(name, config, frames, side, text)
    with ByteCounter() as forward, torch.autocast("cuda", torch.bfloat16):
        output = model(**given, return_dict=False)[0]
    gradient = torch.empty_like(output)
    with ByteCounter() as backward:
        output.backward(gradient)
    return [forward.bytes, backward.bytes]


def main() -> None:
    fake_cuda.install(1, ctypes.CDLL(sys.argv[1]))
    torch.nn.functional.scaled_dot_product_attention, torch.rms_norm = no_attention, fused_rms_norm
    cases = json.load(sys.stdin)
    with fake_cuda.FakeGpu():
        found = [count(*case) for case in cases]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
