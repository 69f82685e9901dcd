"""Serves both train.py scripts: makes the Accelerator, names the backend, and hears the wish to stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.state import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from videox.distributed.build_lock import refuse_dead_locks
from videox.distributed.rendezvous import meet_processes
from videox.errors import UserError, told_once


@dataclass(frozen=True)
class Backend:
    """A launch mode: how it is called, and what follows from how it keeps the weights.

    Attributes:
        name: single | ddp | zero2 | zero3 | fsdp1 | fsdp2.
        processes: how they share the work, in words.
        kind: whose machinery trains: whole (torch), zero (DeepSpeed), fsdp.
        whole_weights: each process can compute alone; else every forward pass is a collective.
        clips_by_own_norm: a step may be clipped by a limit that depends on its own gradient norm.
    """

    name: str
    processes: str
    kind: str
    whole_weights: bool
    clips_by_own_norm: bool

    @property
    def barrier(self) -> str:
        """Where ranks wait for each other: once a "step", or at every layer of each "micro" batch."""
        return "step" if self.whole_weights else "micro"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("single", "one process", "whole", True, True),
        Backend("ddp", "whole weights on each process", "whole", True, True),
        Backend("zero2", "DeepSpeed: optimizer and gradients divided among processes", "zero", True, False),
        Backend("zero3", "DeepSpeed: weights, optimizer and gradients divided", "zero", False, False),
        Backend("fsdp1", "weights, optimizer and gradients divided among processes", "fsdp", False, True),
        Backend("fsdp2", "weights, optimizer and gradients divided among processes", "fsdp", False, True),
    )
}
ON = ("true", "1")
# How long processes wait for one that samples, indexes or writes; torch's own ten minutes end a run in such a pause.
TWICE = 0.3  # seconds within which a second Ctrl-C is the first one's echo
PATIENCE = timedelta(hours=1)
_OPEN: list[object] = []  # the store of the processes' meeting, which torch goes on to use


def asked_for(environment: Mapping[str, str]) -> str:
    """Returns what the launcher's variables ask for: "zero", "fsdp", or "whole" (DDP or one process)."""
    for variable, kind in (("ACCELERATE_USE_DEEPSPEED", "zero"), ("ACCELERATE_USE_FSDP", "fsdp")):
        if environment.get(variable, "false").lower() in ON:
            return kind
    return "whole"


def resolved(accelerator: Accelerator) -> str:
    """Returns the name of the backend that accelerate made, or its own name for one that is not in BACKENDS."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    names = {DistributedType.NO: "single", DistributedType.MULTI_GPU: "ddp", DistributedType.MULTI_CPU: "ddp"}
    return names.get(kind, str(kind))


def backend_of(accelerator: Accelerator) -> Backend:
    """Returns the backend that accelerate made, one of BACKENDS."""
    return BACKENDS[resolved(accelerator)]


def refuse_other_launch(environment: Mapping[str, str], processes: int, name: str) -> None:
    """Refuses to start when something else runs than the launcher and the flags ask for.

    accelerate falls back in silence: to one process, to several that do not know of each other, to DDP.

    Args:
        environment: the launcher's variables.
        processes: that have joined.
        name: as `resolved` returns it.

    Raises:
        UserError: naming both.
    """
    where, asked = "accelerate launch", int(environment.get("WORLD_SIZE", "1"))
    if processes != asked:
        hint = "on CPUs set ACCELERATE_USE_CPU=true and launch with --multi_gpu"
        raise UserError(where, f"{asked} processes asked for, {processes} joined", hint)
    if name not in BACKENDS:
        raise UserError(where, f"{name} is not supported", f"launch one of {', '.join(BACKENDS)}")
    if BACKENDS[name].kind != asked_for(environment):
        titles = {"zero": "DeepSpeed", "fsdp": "FSDP", "whole": "neither DeepSpeed nor FSDP"}
        what = f"{titles[asked_for(environment)]} was asked for, {name} would run"
        raise UserError(
            where, what, "launch it by `accelerate launch`, without ACCELERATE_USE_CPU where there is a GPU"
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if BACKENDS[name].kind == "zero" and stage is not None and name != f"zero{stage}":
        what = f"--zero_stage {stage}, but the DeepSpeed file says stage {name.removeprefix('zero')}"
        raise UserError(
            where, what, "give the file of that stage: config/zero_stage2_config.json or zero_stage3_config.json"
        )


@contextmanager
def _launch_on_cpu(kind: str) -> Iterator[None]:
    """Lets accelerate resolve DeepSpeed and FSDP on a machine without a GPU; elsewhere it changes nothing.

    torch's FSDP and DeepSpeed run on CPUs over gloo. accelerate offers FSDP on accelerators only, and takes
    ACCELERATE_USE_CPU for DDP: so the variable is put aside, and its choice of a backend is answered for it.
    """
    if kind == "whole" or torch.accelerator.is_available():
        yield
        return
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if kind == "zero":  # for DeepSpeed a process group over gloo, which accelerate can be asked for, is enough
        yield
        return
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu"}
    before = PartialState._prepare_backend
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = before


def follow_launcher(environment: Mapping[str, str]) -> None:
    """Has the kernel send SIGTERM to this process when the launcher that started it dies (Linux).

    `accelerate launch` does not pass a SIGTERM on to a single process: without this the run would go on unseen.
    """
    if "ACCELERATE_MIXED_PRECISION" in environment:
        follow_parent()


def follow_parent() -> None:
    """Has the kernel send SIGTERM to this process when the one that started it dies (Linux)."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(parent_death_signal, signal.SIGTERM)


def make_accelerator(mixed_precision: str | None) -> tuple[Accelerator, Backend]:
    """Returns the Accelerator and the backend that really runs.

    Gradients are accumulated by the training loop itself (it knows from the plan which micro-batch is the last), and
    batches are dealt by the plan, so the Accelerator is given neither a number of accumulation steps nor a loader.

    Args:
        mixed_precision: "no" | "bf16", None = the launcher's; the masters are float32 in any case.

    Raises:
        UserError: what runs is not what the launcher and mixed_precision ask for.
        PeerFailed: a process has not come, or DeepSpeed would wait for a dead one's build lock.
    """
    kind = asked_for(os.environ)
    if kind == "fsdp":
        # Every process reads the same files. Otherwise only the first would, and transformers would leave the frozen
        # encoders of the others empty.
        os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false"}
    if kind == "zero":
        with told_once(os.environ):
            refuse_dead_locks(os.environ)
    _OPEN.append(meet_processes(os.environ))
    gloo = {"backend": "gloo"} if kind == "zero" and not torch.accelerator.is_available() else {}
    # No buffer changes here; DDP would send them all before every forward pass, and processes would wait for that.
    constant = DistributedDataParallelKwargs(broadcast_buffers=False)
    handlers = [InitProcessGroupKwargs(timeout=PATIENCE, **gloo), constant]
    with _launch_on_cpu(kind):
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers)
    if accelerator.device.type == "cpu":  # not "cpu:0", to which `.to` would copy what is there already
        PartialState().device = accelerator.state.device = torch.device("cpu")
    if accelerator.mixed_precision not in ("no", "bf16"):
        what = f"{accelerator.mixed_precision} overflows in these models"
        raise UserError("--mixed_precision", what, "launch and train with bf16 or no")
    if kind != "zero":  # whatever a launcher left in the environment: the plan accumulates, and no loss is divided
        accelerator.gradient_accumulation_steps = 1
    name = resolved(accelerator)
    refuse_other_launch(os.environ, accelerator.num_processes, name)
    if kind == "zero":
        # From here on transformers would divide whatever it loads, also the frozen encoders, which ZeRO does not run.
        unset_hf_deepspeed_config()
    if mixed_precision is not None and accelerator.mixed_precision != mixed_precision:
        what = f"{mixed_precision}, but the DeepSpeed file computes in {accelerator.mixed_precision}"
        raise UserError("--mixed_precision", what, "make them say the same")
    return accelerator, BACKENDS[name]


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Returns the precision that the model computes in; its masters are float32 in any case."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def gather_objects(accelerator: Accelerator) -> Callable[[Any], list[Any]]:
    """Returns a function that every process calls with its value and that gives each the list of all, by rank."""

    def gather(value: object) -> list[Any]:
        if accelerator.num_processes == 1:
            return [value]
        values: list[Any] = [None] * accelerator.num_processes
        dist.all_gather_object(values, value)
        return values

    return gather


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor over all processes; the tensor itself when there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def accumulate(accelerator: Accelerator, model: Any, last: bool) -> Iterator[None]:  # noqa: ANN401 - wrapped or an engine
    """Leaves gradients unreduced except in a step's last micro-batch; FSDP divides them after each, to save memory."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.set_gradient_accumulation_boundary(last)
        yield
    elif last or accelerator.num_processes == 1 or accelerator.distributed_type == DistributedType.FSDP:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, model: Any, loss: torch.Tensor) -> None:  # noqa: ANN401 - as above
    """Adds the gradients of a loss that counts as a sum over processes; every backend takes the mean over them."""
    scaled = (loss * accelerator.num_processes).float()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # A loss that is not finite must leave no finite gradient: by that DeepSpeed knows a step to leave.
        model.backward(scaled * (1 + 0 * scaled.detach()), scale_wrt_gas=False)
    else:
        accelerator.backward(scaled)


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 or SIGHUP into a wish to stop at the step's end; a second SIGINT ends at once.

    One that comes within TWICE seconds of the first is the same, passed on by a launcher or a shell.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._heard = 0.0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_name:
            if number == signal.SIGINT and time.monotonic() - self._heard > TWICE:
                os._exit(128 + number)
            return  # the launcher, or the kernel in its place, passing on what was heard already
        self.signal_name, self._heard = signal.Signals(number).name, time.monotonic()
        who = f"process {os.getpid()} saves after this step and then says 'stopped', also when its launcher has left"
        said = f"\n{self.signal_name}: {who} (Ctrl-C again: leave at once, last save kept)\n"
        with contextlib.suppress(OSError):  # a lost terminal; and a buffered stream may not be entered twice
            os.write(2, said.encode())
