"""Serves both training loops where --lora_rank is given: trained adapters on a frozen transformer, through peft."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from videox.errors import UserError
from videox.rng import Purpose, hash_key
from videox.weights.safetensors_io import TensorSource

ADAPTER = "default"  # peft's name for the one adapter of a model; it stands in its parameters' names
BASE_LAYER = ".base_layer."  # what peft puts into the name of a weight that it wraps


@dataclass(frozen=True)
class Lora:
    """A low-rank adaptation: each target's weight W acts as W + alpha / rank * B A, and A and B alone are trained.

    Attributes:
        rank: columns of B and rows of A.
        alpha: above 0.
        dropout: share of a target's inputs, 0 to 1, that its adapter does not see in training.
        targets: full names of the linear layers that have an adapter.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def line(self, stored: TensorSource) -> str:
        """Returns what is to be trained, in one line; stored: the base's weights, of which the shapes are read."""
        numbers = sum(self.rank * sum(stored.shape(f"{target}.weight")) for target in self.targets)
        what = f"{len(self.targets)} linear layers, {numbers / 1e6:.3g} million numbers"
        return f"LoRA        rank {self.rank}, alpha {self.alpha:g}: {what}; everything else stays as it is"

    def config(self) -> LoraConfig:
        """Returns the same in peft's words."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
        )


# ------------------------------------------------------------------------------------------------ what is adapted


def choose_targets(
    shapes: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[str]], asked: Sequence[str] | None
) -> tuple[str, ...]:
    """Returns the names of the linear layers to adapt.

    A pattern is one or more whole parts of a name: "attn1" chooses every linear layer below it, "to_q" each layer of
    this name, "attn1.to_q" those that are inside an attn1.

    Args:
        shapes: of the model's weights, by name.
        own: the family's patterns by list of blocks. They are matched inside it alone: the layers around the blocks,
            such as the refiner of the prompt, have like names.
        asked: patterns matched in the whole model; None takes the family's.

    Raises:
        UserError: a pattern matches no linear layer.
    """
    linear = [name for name in map(_linear, sorted(shapes)) if name and len(shapes[f"{name}.weight"]) == 2]
    if asked is not None:
        chosen = {pattern: [name for name in linear if _matches(name, pattern)] for pattern in asked}
    else:
        chosen = {
            f"{blocks}.*.{pattern}": [
                name for name in linear if name.startswith(f"{blocks}.") and _matches(name, pattern)
            ]
            for blocks, patterns in own.items()
            for pattern in patterns
        }
    for pattern, names in chosen.items():
        if not names:
            parts = sorted({part for name in linear for part in name.split(".") if not part.isdigit()})
            near = difflib.get_close_matches(pattern, parts, 3, 0.4) or parts[:3]
            raise UserError("--lora_target_modules", f"{pattern!r} matches no linear layer", f"try {', '.join(near)}")
    return tuple(sorted({name for names in chosen.values() for name in names}))


def adapter_sizes(shapes: Mapping[str, Sequence[int]], targets: Sequence[str], rank: int) -> dict[str, int]:
    """Returns how many numbers the two matrices of each target have; shapes: of the model's weights, by name."""
    return {target: rank * sum(shapes[f"{target}.weight"]) for target in targets}


def _linear(name: str) -> str:
    """Returns the layer that a weight may be of, "" for another tensor."""
    layer, _, kind = name.rpartition(".")
    return layer if kind == "weight" else ""


def _matches(name: str, pattern: str) -> bool:
    return f".{pattern}." in f".{name}."


# ------------------------------------------------------------------------------------------------- names and values


def public_name(name: str) -> str:
    """Returns what an adapter's parameter is called in files: without peft's name of the adapter."""
    return name.replace(f".lora_A.{ADAPTER}.", ".lora_A.").replace(f".lora_B.{ADAPTER}.", ".lora_B.")


def own_name(name: str) -> str:
    """Returns what a tensor of a file is called in the model: the inverse of public_name."""
    return name.replace(".lora_A.weight", f".lora_A.{ADAPTER}.weight").replace(
        ".lora_B.weight", f".lora_B.{ADAPTER}.weight"
    )


def base_name(name: str) -> str:
    """Returns what a parameter of the base is called in the model without adapters."""
    return name.replace(BASE_LAYER, ".")


def initial_values(lora: Lora, stored: TensorSource, seed: int) -> dict[str, Tensor]:
    """Returns float32 A [rank, in] and B [out, rank] to begin with, by name: B is 0, so that the model is the base.

    A is uniform in +-1/sqrt(in), as in peft: He et al., "Delving Deep into Rectifiers" (2015), with a^2 = 5.

    Args:
        lora: what is adapted.
        stored: the base's weights; only their shapes are read.
        seed: of the run; A is drawn by key, alike in every process and backend.
    """
    values = {}
    for number, target in enumerate(lora.targets):
        outputs, inputs = stored.shape(f"{target}.weight")
        draw = torch.Generator().manual_seed(int(hash_key(seed, Purpose.ADAPTER, number)))
        a = nn.init.kaiming_uniform_(torch.empty(lora.rank, inputs), a=math.sqrt(5), generator=draw)
        values[own_name(f"{target}.lora_A.weight")] = a
        values[own_name(f"{target}.lora_B.weight")] = torch.zeros(outputs, lora.rank)
    return values


# ------------------------------------------------------------------------------------------------ adding adapters


def add_adapters(
    transformer: nn.Module, lora: Lora, values: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> None:
    """Puts adapters beside the targets and freezes everything else.

    Args:
        transformer: of diffusers, with or without memory.
        lora: what is adapted.
        values: of the adapters' parameters, by name.
        device: where they go; "meta" leaves them without memory, for a backend that divides them first.
        dtype: float32, or that of a backend with masters of its own.
    """
    inject_adapter_in_model(lora.config(), transformer, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            # Autocast chooses the dtype; a copy of the inputs in the adapters' float32 would only take memory.
            module.cast_input_dtype_enabled = False
    for parameter in transformer.parameters():
        parameter.requires_grad_(False)
    for name, value in values.items():
        module_name, _, kind = name.rpartition(".")
        setattr(transformer.get_submodule(module_name), kind, nn.Parameter(value.to(device, dtype, copy=True)))


def store_base(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the parameters in `dtype`, except those that diffusers keeps in float32; call it before add_adapters."""
    kept = type(transformer)._keep_in_fp32_modules or ()  # type: ignore[attr-defined]
    for name, parameter in transformer.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)


class Adapted(TensorSource):
    """The tensors of a model with adapters: those of its base, by the names they have there, and the adapters' own.

    Args:
        base: where the base's tensors are.
        values: of the adapters, by name.
    """

    def __init__(self, base: TensorSource, values: Mapping[str, Tensor]) -> None:
        self.folder, self._base, self._values = base.folder, base, values

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name] if name in self._values else self._base[base_name(name)]

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        yield from self._base

    def __len__(self) -> int:
        return len(self._values) + len(self._base)

    def shape(self, name: str) -> tuple[int, ...]:
        """As TensorSource's."""
        return tuple(self._values[name].shape) if name in self._values else self._base.shape(base_name(name))
