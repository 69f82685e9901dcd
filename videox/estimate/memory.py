"""Serves the dry run: what each backend keeps on a GPU, on a host and on the disk, in bytes, and what would fit.

The states are exact: they are what the engines allocate (tests measure them). Activations follow
videox.estimate.flops, whose peak is that of a traced pass. Counted besides are what a library sets aside for
communication, and a round sum for the CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from videox.estimate.flops import Network
from videox.models.activation_checkpoint import select_blocks
from videox.optim.registry import OPTIMIZERS, moments_of

GB = 1e9
CONTEXT = 1.5 * GB  # CUDA context, cuBLAS and cuDNN workspaces: a round sum
FRAGMENTS = 0.05  # of what the allocator holds: blocks that are free, and of the wrong size
WORKER = 0.6 * GB  # host memory of a decoding process at 81 frames
CLOSE = 0.95  # of a GPU's memory: what takes more may not fit after all
LIVE, PREFETCH, BUCKET, SUB_GROUP = 10**9, 5 * 10**7, 5 * 10**8, 10**9  # DeepSpeed's own, in numbers
WHOLE = ("single", "ddp")
DIVIDE = (*WHOLE, "zero2", "fsdp1", "zero3", "fsdp2")  # backends, the more they divide the later
TITLES = {"zero3": "ZeRO-3", "fsdp1": "FSDP", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class Parameters:
    """How many numbers a transformer's parameters are.

    total: all; trained: those that get gradients, a LoRA's alone if there is one; block: the largest repeated block;
    outside: in no block.
    """

    total: int
    trained: int
    block: int
    outside: int


@dataclass(frozen=True)
class Encoders:
    """The frozen parts, in bytes as they are loaded. weights: by name; work: of the VAE's encoder at its peak."""

    weights: Mapping[str, int]
    work: float

    def total(self) -> int:
        """Returns the bytes of all."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class MemorySetup:
    """What memory depends on.

    Attributes:
        backend: single | ddp | zero2 | zero3 | fsdp1 | fsdp2.
        processes: one per GPU.
        per_host: of them on one machine.
        half: computes in bfloat16.
        recomputed: share of the blocks, 0 to 1, that are recomputed; 1 with gradient_checkpointing.
        rest: encoders leave the GPU between uses (--low_vram).
        workers: decoding processes beside each process.
        tokens: of the largest sample.
        batch: samples of its micro-batch.
        zero: zero_optimization of the DeepSpeed file; {} = DeepSpeed's own.
        average: where an EMA of the masters is kept: "accelerator", "cpu", or "" for none.
        whole: checkpoints of divided weights also hold whole ones.
        optimizer: of videox.optim.registry.OPTIMIZERS.
        adapters: a LoRA trains; the rest is frozen, and kept in the dtype of computation but for FSDP1.
    """

    backend: str
    processes: int
    per_host: int
    half: bool
    recomputed: float
    rest: bool
    workers: int
    tokens: int
    batch: int
    zero: Mapping[str, Any]
    average: str = ""
    whole: bool = False
    optimizer: str = "adamw"
    adapters: bool = False

    @property
    def frozen(self) -> int:
        """Bytes of a weight that is not trained, where it is not DeepSpeed's."""
        fp32_params = OPTIMIZERS[self.optimizer].fp32_params and not self.adapters
        return 2 if self.half and not fp32_params and self.backend != "fsdp1" else 4

    def offloads(self, what: str) -> bool:
        """Returns whether DeepSpeed keeps "optimizer" or "param" on the host."""
        device = (self.zero.get(f"offload_{what}") or {}).get("device", "none")
        return self.backend.startswith("zero") and device != "none"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its GPU and of one machine on its host.

    States stay; of the phases (training, encoding, optimizer step) one runs at a time.
    """

    states: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    host: Mapping[str, float]

    def total(self) -> float:
        """Returns the most bytes at once on a GPU."""
        held = sum(self.states.values()) + max(sum(phase.values()) for phase in self.phases.values())
        return held * (1 + FRAGMENTS) + CONTEXT

    def items(self) -> dict[str, float]:
        """Returns every item, and the total."""
        named = {name: size for phase in self.phases.values() for name, size in phase.items()}
        fragments = self.total() - CONTEXT - (self.total() - CONTEXT) / (1 + FRAGMENTS)
        return {**self.states, **named, "context": CONTEXT, "fragments": fragments, "total": self.total()}


def state_bytes(parameters: Parameters, setup: MemorySetup) -> dict[str, float]:
    """Returns weights, masters, gradients and optimizer of one process, as its engine keeps them on the GPU.

    Masters are float32, but for optimizers that round at random. Where weights are whole or FSDP's they are the
    masters; DeepSpeed keeps bfloat16 weights beside them. AdamW has two float32 moments for each trained number.
    """
    everything, trained, share = parameters.total, parameters.trained, 1 / setup.processes
    if setup.backend in WHOLE or setup.backend.startswith("fsdp"):
        optimizer, part = OPTIMIZERS[setup.optimizer], 1.0 if setup.backend in WHOLE else share
        sizes = {"weights": setup.frozen * (everything - trained) + optimizer.weight_bytes * trained, "masters": 0}
        # FSDP1 lays a block end to end, and the gradient of all of it is held if a part of it trains
        learning = everything - parameters.outside if setup.backend == "fsdp1" and trained < everything else trained
        sizes |= {"gradients": optimizer.weight_bytes * learning, "optimizer": optimizer.moment_bytes * trained}
        return {name: part * size for name, size in sizes.items()}
    weights = (2.0 if setup.half else 4.0) * everything * (share if setup.backend == "zero3" else 1)
    divided = {"masters": 4.0 * trained, "gradients": 4.0 * trained, "optimizer": 8.0 * trained}
    states = {"weights": weights, **{name: size * share for name, size in divided.items()}}
    if setup.offloads("optimizer"):
        states |= {"masters": 0.0, "gradients": 0.0, "optimizer": 0.0}
    if setup.offloads("param"):
        states["weights"] = 0.0
    return states


def communication_bytes(parameters: Parameters, setup: MemorySetup) -> float:
    """Returns what a backend sets aside, beside the states, to compute and to exchange: gathers, buckets, casts."""
    size = 2 if setup.half else 4
    if setup.backend in WHOLE:
        weight = OPTIMIZERS[setup.optimizer].weight_bytes
        cast = parameters.trained * (weight == 4) + (parameters.total - parameters.trained) * (setup.frozen == 4)
        copies = 2 * cast if setup.half else 0  # autocast's, for the length of a forward pass
        buckets = weight * parameters.trained if setup.backend == "ddp" else 0  # the reducer's
        return float(copies + buckets)
    share = 1 / setup.processes
    if setup.backend.startswith("fsdp"):
        gathered = parameters.outside + 2 * parameters.block  # the next block is gathered meanwhile
        return gathered * size * (1 + share) + parameters.block * (size + 4)  # a block's gradients, cast to reduce
    bucket = min(int(_number(setup.zero, "reduce_bucket_size", BUCKET)), parameters.trained)
    if setup.backend == "zero2":
        buffers = 2 if setup.zero.get("overlap_comm", True) else 1
        return buffers * bucket * size + 2.0 * parameters.block * size
    live = int(_number(setup.zero, "stage3_max_live_parameters", LIVE))
    live += int(_number(setup.zero, "stage3_prefetch_bucket_size", PREFETCH))
    return (min(max(live, parameters.block), parameters.total) + bucket + parameters.block) * float(size)


def _number(zero: Mapping[str, Any], name: str, default: float) -> float:
    value = zero.get(name, default)
    return default if value == "auto" else float(value)


def memory_of(parameters: Parameters, network: Network, encoders: Encoders, setup: MemorySetup) -> Memory:
    """Returns what a run with this setup takes."""
    states = state_bytes(parameters, setup)
    if setup.average == "accelerator":
        states["average"] = _divided(4.0 * parameters.trained, setup)
    kept = float(encoders.total())
    if not setup.rest:
        states["encoders"] = kept
    chosen = select_blocks(len(network.blocks), setup.recomputed) if setup.recomputed else []
    training = {
        "activations": setup.batch * network.peak(setup.tokens, chosen),
        "communication": communication_bytes(parameters, setup),
    }
    encoding = {"encoding": encoders.work}
    if setup.rest:  # one part is awake at a time, and the next one is on its way; the VAE is the last
        sizes = encoders.weights
        pairs = [s + max((t for m, t in sizes.items() if m != n), default=0) for n, s in sizes.items() if n != "vae"]
        encoding = {"encoding": max([sizes.get("vae", 0) + encoders.work, *pairs])}
    step: dict[str, float] = {}
    if setup.backend == "zero3" and not setup.offloads("optimizer"):  # flattens a sub-group's gradients once more
        part = int(_number(setup.zero, "sub_group_size", SUB_GROUP))
        step = {"optimizer step": 4.0 * min(parameters.trained / setup.processes, part)}
    return Memory(
        states, {"training": training, "encoding": encoding, "step": step}, host_bytes(parameters, encoders, setup)
    )


def _divided(size: float, setup: MemorySetup) -> float:
    """Returns this process's part of what is divided as the masters are."""
    return size if setup.backend in WHOLE else size / setup.processes


def host_bytes(parameters: Parameters, encoders: Encoders, setup: MemorySetup) -> dict[str, float]:
    """Returns the bytes on one machine's host: while loading, and while training.

    Every process loads the whole transformer, as it is to be kept, before it is moved or divided; under ZeRO-3 and
    FSDP2 it reads its own part alone. Encoders lie there once for all processes of a machine.
    """
    count, trained = setup.per_host, float(parameters.trained)
    share = 1 / setup.processes if setup.backend in ("zero3", "fsdp2") else 1.0
    training = {
        "resting encoders": float(encoders.total()) if setup.rest else 0.0,
        "workers": count * setup.workers * WORKER,
    }
    if setup.offloads("optimizer"):
        training["offloaded optimizer"] = count * 16 * trained / setup.processes
    if OPTIMIZERS[setup.optimizer].on_host:
        training["offloaded optimizer"] = count * OPTIMIZERS[moments_of(setup.optimizer)].moment_bytes * trained
    if setup.offloads("param"):
        training["offloaded weights"] = count * 2.0 * parameters.total / setup.processes
    if setup.average == "cpu":
        training["average"] = count * _divided(4.0 * trained, setup)
    return {"loading": count * setup.frozen * parameters.total * share + encoders.total(), **training}


def checkpoint_size(parameters: Parameters, setup: MemorySetup) -> float:
    """Returns the bytes of one checkpoint: weights and moments, and what DeepSpeed writes besides.

    An average is one more copy of what is kept; so are whole weights where the backend's own are divided. Of a LoRA's
    base nothing is kept.
    """
    optimizer = OPTIMIZERS[moments_of(setup.optimizer)]
    usual = (optimizer.weight_bytes + optimizer.moment_bytes, setup.frozen)
    trained, frozen = {"zero2": (18, 6), "zero3": (14, 2)}.get(setup.backend, usual)
    kept = parameters.trained if setup.adapters else parameters.total
    copies = int(bool(setup.average)) + int(setup.whole and setup.backend in ("zero3", "fsdp1", "fsdp2"))
    own = trained * parameters.trained + frozen * (kept - parameters.trained)
    return float(own + copies * 4 * kept)


# ------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Change:
    """One thing to set otherwise: the words for it, and what it makes of a setup (None where it changes nothing)."""

    words: str
    apply: Callable[[MemorySetup], MemorySetup | None]


def _recompute(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, recomputed=1.0) if setup.recomputed < 1 else None


def _rest(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, rest=True) if not setup.rest else None


def _single(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, batch=1) if setup.batch > 1 else None


def _divide(setup: MemorySetup, backend: str) -> MemorySetup | None:
    if backend not in OPTIMIZERS[setup.optimizer].backends or setup.processes == 1:
        return None
    return replace(setup, backend=backend) if DIVIDE.index(backend) > DIVIDE.index(setup.backend) else None


def _plainly(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, optimizer="adamw") if setup.optimizer != "adamw" else None


def _offload(setup: MemorySetup) -> MemorySetup | None:
    done = setup.offloads("optimizer") and setup.offloads("param")
    if done or "zero3" not in OPTIMIZERS[setup.optimizer].backends:
        return None
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return replace(setup, backend="zero3", zero={**setup.zero, **away})


def _moments_away(setup: MemorySetup, name: str) -> MemorySetup | None:
    fits = setup.optimizer == OPTIMIZERS[name].moments_of and setup.backend in OPTIMIZERS[name].backends
    return replace(setup, optimizer=name) if fits else None


def _times(setup: MemorySetup, factor: int, processes: int) -> MemorySetup | None:
    if setup.backend in WHOLE or setup.processes != processes:
        return None
    return replace(setup, processes=setup.processes * factor)


def _changes(divided: str) -> list[Change]:
    """Returns what may be changed, the cheapest in time first; divided: the family's backend that divides weights."""
    return [
        Change("--optimizer adamw", _plainly),  # which every backend takes
        Change("--low_vram", _rest),
        Change("--gradient_checkpointing", _recompute),
        Change("--train_batch_size 1", _single),
        Change("ZeRO-2", partial(_divide, backend="zero2")),
        Change(TITLES[divided], partial(_divide, backend=divided)),
        Change(TITLES["fsdp2"], partial(_divide, backend="fsdp2")),
    ]


def _dearer(processes: int) -> tuple[list[Change], list[Change]]:
    """Returns what may be changed at a price: in time, and in GPUs; processes: that there are."""
    host = "ZeRO-3 with weights and optimizer on the host, config/zero_stage3_config_cpu_offload.json"
    more = {"twice": 2, "four times": 4, "eight times": 8}
    away = [name for name, kind in OPTIMIZERS.items() if kind.on_host]
    moments = [Change(f"--optimizer {name}", partial(_moments_away, name=name)) for name in away]
    return [*moments, Change(host, _offload)], [
        Change(f"{words} the processes", partial(_times, factor=factor, processes=processes))
        for words, factor in more.items()
    ]


def nearest_that_fits(
    setup: MemorySetup,
    limit: float,
    memory: Callable[[MemorySetup], Memory],
    *,
    divided: str = "zero3",
    shorter: Sequence[int] = (),
) -> list[tuple[list[str], MemorySetup]]:
    """Returns the fewest changes after which a run fits, in words, and the setup; none where none is found.

    Only where nothing else fits on the processes that there are, the ways are to put states on the host, which costs
    time at each step, and to have more processes; and where these fail, a smaller largest sample.

    Args:
        setup: that does not fit.
        limit: bytes of a GPU.
        memory: of a setup.
        divided: the backend of the family that divides the weights.
        shorter: token counts of smaller budgets, descending; tried last, since they change what is trained.
    """
    changes = _changes(divided)

    def first(*more: Change) -> list[tuple[list[str], MemorySetup]]:
        ways = _combinations(setup, [*changes, *more])
        return [*islice((way for way in ways if memory(way[1]).total() <= limit), 1)]

    found = first()
    for more in () if found else _dearer(setup.processes):
        found += first(*more)
    if found:
        return found
    most = setup
    said: list[str] = []
    for change in changes:
        other = change.apply(most)
        if other is not None:
            most, said = other, [*said, change.words]
    for tokens in shorter:
        smaller = replace(most, tokens=tokens)
        if memory(smaller).total() <= limit:
            return [([*said, f"a largest sample of {tokens:,} tokens"], smaller)]
    return []


def _combinations(setup: MemorySetup, changes: Sequence[Change]) -> Iterator[tuple[list[str], MemorySetup]]:
    """Yields one change, then two, then three: each with its words."""
    level: list[tuple[list[str], MemorySetup, int]] = [([], setup, 0)]
    for _ in range(3):
        found = []
        for words, before, first in level:
            for number in range(first, len(changes)):
                after = changes[number].apply(before)
                if after is not None:
                    found.append(([*words, changes[number].words], after, number + 1))
        yield from ((words, after) for words, after, _ in found)
        level = found
