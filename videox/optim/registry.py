"""The optimizers by name: packages, supported backends, memory per parameter, and checks before a run starts.

Any other class is selected by its dotted name; videox.optim.custom_class finds out what it supports.
"""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from videox.errors import UserError

if TYPE_CHECKING:  # the table is read by the flags, which are parsed before torch is imported
    from torch import Tensor

# Values of diffusers' SchedulerType without piecewise_constant, whose steps no flag here can state.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

CAME_INSTABILITY = 0.9999  # CAME's third decay; its epsilons are its defaults, 1e-30 and 1e-16


@dataclass(frozen=True)
class Optimizer:
    """An optimizer that --optimizer can select.

    Attributes:
        package: its pip requirement with the version; "" for torch's own.
        module: the Python module of the package.
        backends: backends under which it steps and resumes bit-identically (names of
            videox.distributed.backends.BACKENDS).
        reason: why it does not work under the others.
        fp32_params: trainable parameters are float32. Otherwise they are bfloat16 with stochastic rounding, so that
            small updates are kept on average.
        bytes_per_parameter: bytes per trainable parameter on the GPU: weight, gradient and moments.
        by_shard: under FSDP2 each rank steps its own shards, and a resume needs the same number of ranks.
        moments_of: the optimizer with the same arithmetic and moments: each can resume from the other's checkpoints;
            "" = none.
        on_host: moments and arithmetic are in host memory (videox.optim.cpu_offload), not in `bytes_per_parameter`.
        group_state: keys of the parameter groups that its steps change; they are saved with the moments.
    """

    package: str
    module: str
    backends: tuple[str, ...]
    reason: str
    fp32_params: bool
    bytes_per_parameter: int
    by_shard: bool = False
    moments_of: str = ""
    on_host: bool = False
    group_state: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes per trainable parameter of the weight; the same again for its gradient."""
        return 4 if self.fp32_params else 2

    @property
    def moment_bytes(self) -> int:
        """Bytes per trainable parameter of the moments on the GPU."""
        return self.bytes_per_parameter - 2 * self.weight_bytes


REPLICATED = ("single", "ddp")
SHARDED = (*REPLICATED, "fsdp2")
FLAT = "DeepSpeed and FSDP1 flatten weights and store moments by the names and sizes of AdamW's"
MATRICES = "its moments are rows and columns of complete matrices, and this backend shards them"
OWN_OFFLOAD = "ZeRO and FSDP shard moments and have a CPU offload of their own"
ONE_STEP_SIZE = "its step size is estimated from all parameters together, and this backend shards them"
TORCHAO = "torchao==0.18.0"
PRODIGY_STATE = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
OPTIMIZERS = {
    "adamw": Optimizer("", "torch", (*SHARDED, "zero2", "zero3", "fsdp1"), "", True, 16),
    "adamw8bit": Optimizer("bitsandbytes==0.50.2", "bitsandbytes", SHARDED, FLAT, True, 10, by_shard=True),
    "came": Optimizer("came-pytorch==0.1.3", "came_pytorch", REPLICATED, MATRICES, True, 12),
    "adamw_bf16": Optimizer(TORCHAO, "torchao", SHARDED, FLAT, False, 12, by_shard=True),
    "adamw8bit_bf16": Optimizer(TORCHAO, "torchao", SHARDED, FLAT, False, 6, by_shard=True),
    "adamw_offload": Optimizer("", "torch", REPLICATED, OWN_OFFLOAD, True, 8, moments_of="adamw", on_host=True),
    "adamw_bf16_offload": Optimizer(
        TORCHAO, "torchao", REPLICATED, OWN_OFFLOAD, False, 4, moments_of="adamw_bf16", on_host=True
    ),
    "prodigy": Optimizer(
        "prodigyopt==1.1.2", "prodigyopt", REPLICATED, ONE_STEP_SIZE, True, 24, group_state=PRODIGY_STATE
    ),
}
# Optimizer classes by dotted name, added by videox.optim.custom_class when it has tried them in this process.
CLASSES: dict[str, Optimizer] = {}


def optimizer_name(text: str) -> str:
    """Return the value of --optimizer, a type for argparse: a name in OPTIMIZERS, or the dotted name of a class."""
    if text in OPTIMIZERS or is_class_name(text):
        return text
    names = ", ".join(OPTIMIZERS)
    raise UserError(
        "--optimizer", f"{text!r} is not known", f"use one of {names}, or a class such as torch.optim.RAdam"
    )


def is_class_name(name: str) -> bool:
    """Return whether the name is a dotted one of a class, such as torch.optim.RAdam, not a key of OPTIMIZERS."""
    return "." in name


def kind_of(name: str) -> Optimizer:
    """Return what is known of an optimizer: a name in OPTIMIZERS, or a class that was tried in this process."""
    return CLASSES[name] if is_class_name(name) else OPTIMIZERS[name]


def takes_settings(name: str) -> bool:
    """Return whether --optimizer_args sets the optimizer's own settings; the settings of the others are flags."""
    return is_class_name(name) or name == "prodigy"


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the settings of --optimizer_args: numbers, tuples such as 0.9,0.99, true, false, none, or text.

    Args:
        words: each is key=value.

    Raises:
        UserError: a word is not of this form, or its key is given twice or is the learning rate.
    """
    flag, settings = "--optimizer_args", {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(flag, f"{word!r} is not of the form key=value", "write for example betas=0.9,0.99")
        if key in ("lr", "params"):
            raise UserError(flag, f"{key} is not a setting here", "pass the learning rate as --learning_rate")
        if key in settings:
            raise UserError(flag, f"{key} is given twice", "pass it once")
        settings[key] = _value(text)
    return settings


def _value(text: str) -> object:
    constants: dict[str, object] = {"true": True, "false": False, "none": None, "inf": float("inf")}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def moments_of(name: str) -> str:
    """Return the name of the optimizer whose moments the named one has (Optimizer.moments_of), or the name itself."""
    return (name in OPTIMIZERS and OPTIMIZERS[name].moments_of) or name


def check_installed(name: str) -> None:
    """Raise UserError if an optimizer's package, or the compiler that it needs, is not installed."""
    if is_class_name(name):
        package = name.partition(".")[0]
        if not package or find_spec(package) is None:
            hint = f"install the package that contains it, often pip install {package}, or correct the name"
            raise UserError("--optimizer", f"{name}: there is no module {package}", hint)
        return
    optimizer = OPTIMIZERS[name]
    if find_spec(optimizer.module) is None:
        what = f"{name} needs {optimizer.package.split('=')[0]}, which is not installed"
        raise UserError("--optimizer", what, f"pip install {optimizer.package}")
    compiler = os.environ.get("CXX", "g++")  # torch.compile selects its C++ compiler in the same way
    if optimizer.on_host and optimizer.package == TORCHAO and shutil.which(compiler) is None:
        what = f"{name}'s step is compiled for the host, which has no {compiler}"
        raise UserError("--optimizer", what, "install a C++ compiler, or use adamw_offload")


def check_supported(name: str, backend: str, precision: str, *, lora: bool) -> None:
    """Raise UserError if the optimizer cannot step or resume under this backend and precision.

    Args:
        name: a name in OPTIMIZERS, or of a class that was tried.
        backend: the backend's name.
        precision: the mixed precision, "bf16" | "no".
        lora: LoRA adapters are trained.

    Raises:
        UserError: with the optimizers and backends that work.
    """
    optimizer = kind_of(name)
    if backend not in optimizer.backends:
        supported = [other for other, entry in OPTIMIZERS.items() if backend in entry.backends]
        hint = f"use {' or '.join(supported)} here, or launch with {', '.join(optimizer.backends)}"
        raise UserError("--optimizer", f"{name} does not work under {backend}: {optimizer.reason}", hint)
    if not optimizer.fp32_params and lora:
        what = f"{name} trains bfloat16 parameters, and a LoRA's are float32"
        raise UserError("--optimizer", what, "use adamw, adamw_offload or adamw8bit")
    if not optimizer.fp32_params and precision != "bf16":
        raise UserError("--optimizer", f"{name} trains bfloat16 parameters", "pass --mixed_precision bf16")


def optimizer_class(
    name: str,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    settings: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return a callable that makes an optimizer from parameter groups and lr.

    Args:
        name: a name in OPTIMIZERS that is its own moments_of, or of a class; its package is imported here.
        betas: decays of the moments; a class by dotted name gets `settings` only.
        weight_decay: per unit of learning rate.
        epsilon: added to the root of the second moment; CAME has its own.
        settings: further ones of an optimizer of takes_settings.
    """
    if is_class_name(name):
        module, _, class_name = name.rpartition(".")  # videox.optim.custom_class has checked that it exists
        return partial(getattr(import_module(module), class_name), **(settings or {}))
    adam: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return partial(AdamW8bit, **adam)
    if name == "came":
        from came_pytorch import CAME

        return partial(CAME, betas=(*betas, CAME_INSTABILITY), weight_decay=weight_decay)
    if name == "prodigy":
        from prodigyopt import Prodigy

        return partial(Prodigy, **{**adam, **(settings or {})})
    if name == "adamw_bf16":
        return partial(_rounded_adamw(), **adam)
    if name == "adamw8bit_bf16":
        from torchao.optim import AdamW8bit as RoundedAdamW8bit

        return partial(RoundedAdamW8bit, bf16_stochastic_round=True, **adam)
    import torch

    return partial(torch.optim.AdamW, **adam)


def _rounded_adamw() -> type:
    """Return torchao's AdamW with moments in float32.

    With torchao's bfloat16 moments the second moment stops growing at about a quarter of its true value: there its
    update, a thousandth of the difference, is less than half of the last digit. Every step would be nearly twice as
    long as Adam's.
    """
    import torch
    from torchao.optim import _AdamW

    class RoundedAdamW(_AdamW):
        def __init__(self, groups: Any, **settings: Any) -> None:  # noqa: ANN401 - torch's
            super().__init__(groups, bf16_stochastic_round=True, **settings)

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            del signed
            return torch.zeros_like(p, dtype=torch.float32)

    return RoundedAdamW
