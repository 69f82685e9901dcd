"""Serves both training loops: the optimizers by name, what each needs, where it works, and what it costs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from videox.errors import UserError

CAME_INSTABILITY = 0.9999  # its third decay; with its own epsilons, 1e-30 and 1e-16


@dataclass(frozen=True)
class Optimizer:
    """An optimizer that can be asked for.

    Attributes:
        package: that has it, as pip and as Python call it, with its version; "" for torch's own.
        module: of the package.
        backends: under which it steps and resumes to the bit (names of videox.distributed.accelerator.BACKENDS).
        instead: why not under the others.
        masters: what trains is float32; else it is bfloat16, rounded at random, so that small steps count on average.
        note: bytes of a trained number that it keeps, gradient and weight included.
        by_shard: under FSDP2 each process steps its own shards, and resumes at the same number of processes.
        moments_of: the one whose arithmetic and moments it has: each resumes what the other saved; "" = its own.
        on_host: moments and arithmetic are in host memory (videox.optim.cpu_offload), and not in `note`.
    """

    package: str
    module: str
    backends: tuple[str, ...]
    instead: str
    fp32_params: bool
    note: str
    by_shard: bool = False
    moments_of: str = ""
    on_host: bool = False

    @property
    def weight(self) -> int:
        """Bytes of a trained weight, and of its gradient."""
        return 4 if self.fp32_params else 2

    @property
    def moments(self) -> int:
        """Bytes of a trained number's moments on the GPU."""
        return int(self.note.split()[0]) - 2 * self.weight


WHOLE = ("single", "ddp")
SHARDS = (*WHOLE, "fsdp2")
FLAT = "DeepSpeed and FSDP1 lay weights end to end and keep moments by the names and sizes of AdamW's"
MATRICES = "its moments are rows and columns of whole matrices, and this launch divides them"
DIVIDED = "ZeRO and FSDP, which divide moments, bring them to the host by a CPU offload of their own"
TORCHAO = "torchao==0.18.0"
OPTIMIZERS = {
    "adamw": Optimizer("", "torch", (*SHARDS, "zero2", "zero3", "fsdp1"), "", True, "16 bytes"),
    "adamw8bit": Optimizer("bitsandbytes==0.50.2", "bitsandbytes", SHARDS, FLAT, True, "10 bytes", by_shard=True),
    "came": Optimizer("came-pytorch==0.1.3", "came_pytorch", WHOLE, MATRICES, True, "12 bytes"),
    "adamw_bf16": Optimizer(TORCHAO, "torchao", SHARDS, FLAT, False, "12 bytes", by_shard=True),
    "adamw8bit_bf16": Optimizer(TORCHAO, "torchao", SHARDS, FLAT, False, "6 bytes", by_shard=True),
    "adamw_offload": Optimizer("", "torch", WHOLE, DIVIDED, True, "8 bytes", moments_of="adamw", on_host=True),
    "adamw_bf16_offload": Optimizer(
        TORCHAO, "torchao", WHOLE, DIVIDED, False, "4 bytes", moments_of="adamw_bf16", on_host=True
    ),
}


def moments_of(name: str) -> str:
    """Returns the optimizer whose moments the named one keeps: its own name, or that of the one that it stands for."""
    return (name in OPTIMIZERS and OPTIMIZERS[name].moments_of) or name


def refuse_absent(name: str) -> None:
    """Refuses an optimizer whose package, or the compiler that it needs, is absent; raises UserError with the mend."""
    asked = OPTIMIZERS[name]
    if find_spec(asked.module) is None:
        what = f"{name} needs {asked.package.split('=')[0]}, which is not installed"
        raise UserError("--optimizer", what, f"pip install {asked.package}")
    compiler = os.environ.get("CXX", "g++")  # as torch's own compiler looks for it
    if asked.on_host and asked.package == TORCHAO and shutil.which(compiler) is None:
        what = f"{name}'s step is compiled for the host, which has no {compiler}"
        raise UserError("--optimizer", what, "install a C++ compiler, or give adamw_offload")


def refuse_unfit(name: str, backend: str, precision: str, *, lora: bool) -> None:
    """Refuses an optimizer that this launch cannot step or resume.

    Args:
        name: of OPTIMIZERS.
        backend: its name.
        precision: of computation, "bf16" | "no".
        lora: adapters are trained.

    Raises:
        UserError: with the way out.
    """
    asked = OPTIMIZERS[name]
    if backend not in asked.backends:
        can = [other for other, optimizer in OPTIMIZERS.items() if backend in optimizer.backends]
        hint = f"give {' or '.join(can)} here, or launch one of {', '.join(asked.backends)}"
        raise UserError("--optimizer", f"{name} does not work under {backend}: {asked.instead}", hint)
    if not asked.fp32_params and lora:
        what = f"{name} rounds bfloat16 weights, and a LoRA's are float32"
        raise UserError("--optimizer", what, "give adamw, adamw_offload or adamw8bit")
    if not asked.fp32_params and precision != "bf16":
        raise UserError("--optimizer", f"{name} trains bfloat16 weights", "compute in them: --mixed_precision bf16")


def optimizer_class(
    name: str, *, betas: tuple[float, float], weight_decay: float, epsilon: float
) -> Callable[..., Any]:
    """Returns what makes an optimizer from parameter groups and lr.

    Args:
        name: of OPTIMIZERS, and moments_of itself; its package is imported here.
        betas: decays of the moments.
        weight_decay: per unit of learning rate.
        epsilon: added to the root of the second moment; CAME has its own.
    """
    adam: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return partial(AdamW8bit, **adam)
    if name == "came":
        from came_pytorch import CAME

        return partial(CAME, betas=(*betas, CAME_INSTABILITY), weight_decay=weight_decay)
    if name == "adamw_bf16":
        return partial(_rounded_adamw(), **adam)
    if name == "adamw8bit_bf16":
        from torchao.optim import AdamW8bit as RoundedAdamW8bit

        return partial(RoundedAdamW8bit, bf16_stochastic_round=True, **adam)
    return partial(torch.optim.AdamW, **adam)


def _rounded_adamw() -> type:
    """Returns torchao's AdamW with moments in float32.

    In bfloat16, as it keeps them, the second moment stops at about a quarter of its value, where a thousandth of the
    rest is below half of its last digit: every step would be nearly twice as long as Adam's.
    """
    from torchao.optim import _AdamW

    class RoundedAdamW(_AdamW):
        def __init__(self, groups: Any, **settings: Any) -> None:  # noqa: ANN401 - torch's
            super().__init__(groups, bf16_stochastic_round=True, **settings)

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            del signed
            return torch.zeros_like(p, dtype=torch.float32)

    return RoundedAdamW
