"""LoRA adapters (--lora_rank) on a frozen transformer, through peft: targets, initial values, parameter names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from videox.lora.targets import adapter_sizes
from videox.rng import Purpose, hash_key
from videox.weights.safetensors_io import TensorSource

ADAPTER = "default"  # peft's name for a model's only adapter; it is a part of the adapter's parameter names
BASE_LAYER = ".base_layer."  # inserted by peft into the name of a weight that it wraps
MAGNITUDE = ".lora_magnitude_vector"  # end of the name of a DoRA's magnitudes in files, after the layer's name


@dataclass(frozen=True)
class Lora:
    """A low-rank adaptation: each target's weight W acts as W + alpha / rank * B A, and only A and B are trained.

    Attributes:
        rank: columns of B and rows of A.
        alpha: scale of the update, above 0.
        dropout: the share of a target's inputs (0 to 1) that is dropped for its adapter in training.
        targets: full names of the linear layers that have an adapter.
        dora: each row of an adapted weight is scaled to a trained norm, its magnitude (videox.lora.dora).
        loraplus_ratio: the learning rate of B divided by that of A.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    dora: bool = False
    loraplus_ratio: float = 1.0

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    def summary(self, stored: TensorSource) -> str:
        """Return one line that describes what is trained.

        Args:
            stored: the base model's weights; only their shapes are read.
        """
        count = sum(adapter_sizes(stored.shapes(), self.targets, self.rank, dora=self.dora).values())
        kind = "DoRA" if self.dora else "LoRA"
        what = f"{len(self.targets)} linear layers, {count / 1e6:.3g} M trainable parameters"
        plus = f"; B learns {self.loraplus_ratio:g} times as fast as A" if self.loraplus_ratio != 1 else ""
        return f"{kind}        rank {self.rank}, alpha {self.alpha:g}: {what}; the base model is frozen{plus}"

    def peft_config(self) -> LoraConfig:
        """Return the same settings as peft's LoraConfig."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            use_dora=self.dora,
        )


# -------------------------------------------------------------------------------------------------- names and values


def public_name(name: str) -> str:
    """Return the name of an adapter's parameter in files: the parameter's name without peft's adapter name."""
    if name.endswith(f"{MAGNITUDE}.{ADAPTER}.weight"):
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".lora_A.{ADAPTER}.", ".lora_A.").replace(f".lora_B.{ADAPTER}.", ".lora_B.")


def peft_name(name: str) -> str:
    """Return the parameter name in the model for a tensor name in a file: the inverse of public_name."""
    if name.endswith(MAGNITUDE):
        return f"{name}.{ADAPTER}.weight"
    return name.replace(".lora_A.weight", f".lora_A.{ADAPTER}.weight").replace(
        ".lora_B.weight", f".lora_B.{ADAPTER}.weight"
    )


def base_name(name: str) -> str:
    """Return the name that a parameter of the base has in the model without adapters."""
    return name.replace(BASE_LAYER, ".")


def initial_values(lora: Lora, stored: TensorSource, seed: int) -> dict[str, Tensor]:
    """Return initial float32 A [rank, in] and B [out, rank] by name; B is 0, so that the output is the base model's.

    A is uniform in +-1/sqrt(in), as in peft: He et al., "Delving Deep into Rectifiers" (2015), with a^2 = 5.

    Args:
        lora: rank and target layers.
        stored: the base model's weights; only their shapes are read.
        seed: the run's seed; A is drawn by key and equal in every process and backend.
    """
    values = {}
    for number, target in enumerate(lora.targets):
        outputs, inputs = stored.shape(f"{target}.weight")
        generator = torch.Generator().manual_seed(int(hash_key(seed, Purpose.ADAPTER, number)))
        a = nn.init.kaiming_uniform_(torch.empty(lora.rank, inputs), a=math.sqrt(5), generator=generator)
        values[peft_name(f"{target}.lora_A.weight")] = a
        values[peft_name(f"{target}.lora_B.weight")] = torch.zeros(outputs, lora.rank)
    return values


# -------------------------------------------------------------------------------------------------- adding adapters


def add_adapters(
    transformer: nn.Module, lora: Lora, values: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> None:
    """Add adapters to the target layers and freeze all other parameters.

    Args:
        transformer: a diffusers transformer; its parameters may be on the meta device.
        lora: the adaptation.
        values: the adapters' initial values, by parameter name.
        device: the device of the adapters; "meta" allocates nothing, for a backend that shards them first.
        dtype: float32, or the compute dtype for a backend that keeps float32 copies itself.
    """
    inject_adapter_in_model(lora.peft_config(), transformer, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            # Autocast selects the dtype of the matrix product. peft would first copy the inputs to the adapters'
            # float32, which autocast would cast back: the copy would only use memory.
            module.cast_input_dtype_enabled = False
    for parameter in transformer.parameters():
        parameter.requires_grad_(False)
    for name, value in values.items():
        module_name, _, kind = name.rpartition(".")
        setattr(transformer.get_submodule(module_name), kind, nn.Parameter(value.to(device, dtype, copy=True)))


def cast_base(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters to `dtype`, except those that diffusers keeps in float32; call it before add_adapters."""
    fp32_modules = type(transformer)._keep_in_fp32_modules or ()  # type: ignore[attr-defined]
    for name, parameter in transformer.named_parameters():
        if not any(module in name.split(".") for module in fp32_modules):
            parameter.data = parameter.data.to(dtype)


class AdaptedTensors(TensorSource):
    """The tensors of a model with adapters, by parameter name: the base model's are read from its files.

    Args:
        base: the base model's tensors, by the names of the model without adapters.
        values: the adapters' values, by parameter name.
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
        """See TensorSource.shape."""
        return tuple(self._values[name].shape) if name in self._values else self._base.shape(base_name(name))
