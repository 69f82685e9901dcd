"""Accelerator: created after all processes have joined, and checked to run the requested backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.state import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from videox.distributed.backends import BACKENDS, Backend, backend_name, refuse_other_launch, requested_engine
from videox.distributed.build_lock import refuse_stale_locks
from videox.distributed.peer_watch import PeerWatch
from videox.distributed.rendezvous import wait_for_processes
from videox.errors import UserError, print_once_per_machine

# How long ranks wait for one that samples, indexes or writes: torch's default of ten minutes would end the run.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
# Keeps the rendezvous store alive: torch's own rendezvous uses the same one.
_STORES: list[object] = []


@contextmanager
def _launch_on_cpu(engine: str) -> Iterator[None]:
    """Let accelerate resolve DeepSpeed and FSDP on a machine without a GPU; does nothing on other machines.

    torch's FSDP and DeepSpeed run on CPUs over gloo, but accelerate allows FSDP on accelerators only and maps
    ACCELERATE_USE_CPU to DDP. So the variable is removed, and accelerate's choice of a backend is replaced.

    Args:
        engine: as requested_engine returns it.
    """
    if engine == "replicated" or torch.accelerator.is_available():
        yield
        return
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if engine == "deepspeed":  # needs a gloo process group only, which make_accelerator requests
        yield
        return
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu"}
    original = PartialState._prepare_backend
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = original


def make_accelerator(mixed_precision: str | None, peers: PeerWatch | None = None) -> tuple[Accelerator, Backend]:
    """Return the Accelerator and the backend that really runs.

    The training loop accumulates gradients itself (the plan says which micro-batch is a step's last one), and the plan
    assigns samples to ranks. So the Accelerator gets neither a number of accumulation steps nor a data loader.

    Args:
        mixed_precision: "no" | "bf16", None = the launcher's; fp32 master weights are kept in any case.
        peers: is started when all processes have joined.

    Raises:
        UserError: the running backend is not what the launcher and mixed_precision ask for.
        PeerFailed: a process has not joined, or DeepSpeed would wait for the build lock of a killed process.
    """
    engine = requested_engine(os.environ)
    if engine == "fsdp":
        # Every rank reads the model files. With accelerate's default only rank 0 would, and transformers would leave
        # the frozen encoders of the other ranks empty.
        os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false"}
    if engine == "deepspeed":
        with print_once_per_machine(os.environ):
            refuse_stale_locks(os.environ)
    _STORES.append(store := wait_for_processes(os.environ))
    if peers is not None:
        peers.start(store)
    gloo = {"backend": "gloo"} if engine == "deepspeed" and not torch.accelerator.is_available() else {}
    # Gradients are views of DDP's buckets: without it every gradient is stored twice.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT, **gloo), ddp]
    with _launch_on_cpu(engine):
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers)
    if accelerator.device.type == "cpu":  # accelerate has "cpu:0", to which `.to` copies tensors that are on "cpu"
        PartialState().device = accelerator.state.device = torch.device("cpu")
    if accelerator.mixed_precision not in ("no", "bf16"):
        what = f"{accelerator.mixed_precision} overflows in these models"
        raise UserError("--mixed_precision", what, "launch and train with bf16 or no")
    # The launcher may have set another number; accelerate would divide the loss by it, but the plan accumulates.
    if engine != "deepspeed":
        accelerator.gradient_accumulation_steps = 1
    name = backend_name(accelerator)
    refuse_other_launch(os.environ, accelerator.num_processes, name)
    if engine == "deepspeed":
        # Otherwise transformers would shard every model it loads, also the frozen encoders, which ZeRO does not run.
        unset_hf_deepspeed_config()
    if mixed_precision is not None and accelerator.mixed_precision != mixed_precision:
        what = f"{mixed_precision}, but the DeepSpeed file computes in {accelerator.mixed_precision}"
        raise UserError("--mixed_precision", what, "set both to the same precision")
    return accelerator, BACKENDS[name]


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype that the model computes in; its master weights are float32 in any case."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
