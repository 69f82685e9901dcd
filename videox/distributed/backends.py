"""Launch modes: the table of backends, and the check that the one that runs is the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from videox.errors import UserError

if TYPE_CHECKING:  # the table is read by the flags, which are parsed before accelerate is imported
    from accelerate import Accelerator


@dataclass(frozen=True)
class Backend:
    """A launch mode, and the properties of it that the trainer depends on.

    Attributes:
        name: single | ddp | zero2 | zero3 | fsdp1 | fsdp2.
        description: what is replicated or sharded, for the printed summary.
        engine: the Engine class that trains: replicated (DdpEngine), deepspeed, fsdp.
        full_weights: each rank has all weights and can compute alone; otherwise every forward pass is a collective.
        clips_by_own_norm: a step's clipping limit may depend on its own gradient norm. DeepSpeed's may not: it clips
            inside its own step.
        compiles: the blocks can be compiled (--compile). ZeRO-3 gathers weights in hooks of the layers inside a block.
        recomputes_alone: a rank may recompute other blocks than the others do. Under ZeRO-3 and FSDP1 recomputing a
            block is a collective.
        keeps_attention: recomputed blocks can keep the outputs of attention. Under ZeRO-3 they cannot: DeepSpeed
            gathers weights in both passes, so that selective checkpointing finds other operations when recomputing.
    """

    name: str
    description: str
    engine: str
    full_weights: bool
    clips_by_own_norm: bool
    compiles: bool = True
    recomputes_alone: bool = True
    keeps_attention: bool = True

    @property
    def barrier(self) -> str:
        """Where ranks wait for each other: once per optimizer "step", or at every layer of each "micro"-batch."""
        return "step" if self.full_weights else "micro"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("single", "one process", "replicated", True, True),
        Backend("ddp", "full weights on each process", "replicated", True, True),
        Backend("zero2", "DeepSpeed: optimizer and gradients sharded", "deepspeed", True, False),
        Backend(
            "zero3",
            "DeepSpeed: weights, optimizer and gradients sharded",
            "deepspeed",
            False,
            False,
            False,
            False,
            False,
        ),
        Backend("fsdp1", "weights, optimizer and gradients sharded", "fsdp", False, True, recomputes_alone=False),
        Backend("fsdp2", "weights, optimizer and gradients sharded", "fsdp", False, True),
    )
}
TRUE_VALUES = ("true", "1")


def requested_engine(environment: Mapping[str, str]) -> str:
    """Return the engine that the launcher requests: "deepspeed", "fsdp", or "replicated" (DDP or a single process)."""
    for variable, engine in (("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_USE_FSDP", "fsdp")):
        if environment.get(variable, "false").lower() in TRUE_VALUES:
            return engine
    return "replicated"


def backend_name(accelerator: Accelerator) -> str:
    """Return the name of the backend that accelerate made, or accelerate's own name if it is not in BACKENDS."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == "FSDP":
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    names = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp"}
    return names.get(kind, kind)


def backend_of(accelerator: Accelerator) -> Backend:
    """Return the backend that accelerate made, one of BACKENDS."""
    return BACKENDS[backend_name(accelerator)]


def refuse_other_launch(environment: Mapping[str, str], processes: int, name: str) -> None:
    """Raise UserError if the running backend is not the one that the launcher and the flags ask for.

    accelerate falls back silently: to one process, to several processes that do not know of each other, or to DDP.

    Args:
        environment: the launcher's variables.
        processes: number of processes that joined.
        name: the running backend, as `backend_name` returns it.

    Raises:
        UserError: with the requested and the running backend.
    """
    where, world_size = "accelerate launch", int(environment.get("WORLD_SIZE", "1"))
    if processes != world_size:
        hint = "on CPUs set ACCELERATE_USE_CPU=true and launch with --multi_gpu"
        raise UserError(where, f"{world_size} processes were requested, {processes} joined", hint)
    if name not in BACKENDS:
        raise UserError(where, f"backend {name} is not supported", f"launch one of {', '.join(BACKENDS)}")
    if BACKENDS[name].engine != requested_engine(environment):
        titles = {"deepspeed": "DeepSpeed", "fsdp": "FSDP", "replicated": "neither DeepSpeed nor FSDP"}
        what = f"{titles[requested_engine(environment)]} was requested, {name} would run"
        raise UserError(
            where, what, "launch it by `accelerate launch`, and unset ACCELERATE_USE_CPU on a machine with a GPU"
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if BACKENDS[name].engine == "deepspeed" and stage is not None and name != f"zero{stage}":
        what = f"--zero_stage is {stage}, the DeepSpeed file has stage {name.removeprefix('zero')}"
        raise UserError(
            where, what, "pass the file of that stage: config/zero_stage2_config.json or zero_stage3_config.json"
        )
