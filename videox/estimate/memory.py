"""Memory estimates: bytes per GPU, per host and per checkpoint of each backend.

The states (weights, gradients, optimizer) are exact: they are what the engines allocate, which tests measure.
Activations follow videox.estimate.flops, whose peak is that of a traced pass. In addition, buffers that a library
allocates for communication are counted, and a rough figure for the CUDA context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from videox.estimate.flops import Network
from videox.models.base_precision import BF16, quantised_bytes
from videox.models.recompute import COPIES_ON_DEVICE, GRADIENT_COPIES, ON_DEVICE, select_blocks
from videox.optim.registry import kind_of, moments_of

GB = 1e9
CONTEXT = 1.5 * GB  # CUDA context, cuBLAS and cuDNN workspaces: a rough figure
FRAGMENTATION = 0.05  # share of the allocated memory: free blocks of the wrong size
WORKER = 0.6 * GB  # host memory of a data loader worker at 81 frames
SAFE_SHARE = 0.95  # share of a GPU's memory up to which an estimate surely fits
LIVE_PARAMETERS, PREFETCH_BUCKET, REDUCE_BUCKET, SUB_GROUP = (
    10**9,
    5 * 10**7,
    5 * 10**8,
    10**9,
)  # DeepSpeed's defaults, in elements
UNSHARDED = ("single", "ddp")
BY_SHARDING = (*UNSHARDED, "zero2", "fsdp1", "zero3", "fsdp2")  # backends in order of how much they shard


@dataclass(frozen=True)
class BlockWeights:
    """The weights of a repeated block, without adapters.

    elements: all; linear: those of the weights of linear layers that --base_precision quantises; rows: the rows of
    these weights; largest: elements of the largest of them; trained: those that get gradients.
    """

    elements: int
    linear: int
    rows: int
    largest: int
    trained: int = 0

    @property
    def frozen(self) -> int:
        """Elements that get no gradients."""
        return self.elements - self.trained

    def bytes_in(self, precision: str, element: int) -> float:
        """Return the bytes of what is frozen: linear layers in a precision, `element` bytes for every other number."""
        if precision == BF16:
            return float(element * self.frozen)
        return quantised_bytes(precision, self.linear, self.rows) + element * (self.elements - self.linear)


@dataclass(frozen=True)
class Parameters:
    """The number of parameters of a transformer.

    total: all; trainable: those that get gradients, with a LoRA those of the adapters alone; block: of the largest
    repeated block; outside: of all layers outside the repeated blocks; blocks: the repeated blocks, in order, where
    their weights may be quantised or streamed.
    """

    total: int
    trainable: int
    block: int
    outside: int
    blocks: tuple[BlockWeights, ...] = ()


@dataclass(frozen=True)
class Encoders:
    """Bytes of the frozen encoders as they are loaded.

    weights: of each encoder, by name; vae_peak: peak activations of the VAE's encoder for one clip.
    """

    weights: Mapping[str, int]
    vae_peak: float

    def total(self) -> int:
        """Return the bytes of all encoders' weights."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class MemorySetup:
    """The settings that memory depends on.

    Attributes:
        backend: single | ddp | zero2 | zero3 | fsdp1 | fsdp2.
        processes: number of processes, one per GPU.
        per_host: number of processes on one machine.
        half: computes in bfloat16.
        recompute_share: share of the blocks, 0 to 1, under activation checkpointing; 1 with gradient_checkpointing.
        offload_encoders: encoders leave the GPU between uses (--low_vram).
        workers: data loader workers per process.
        tokens: tokens of the largest sample.
        batch: samples of its micro-batch.
        zero: zero_optimization of the DeepSpeed file; {} = DeepSpeed's defaults.
        ema_device: where an EMA of the fp32 parameters is stored: "accelerator", "cpu", or "" for no EMA.
        full_weights: checkpoints of sharded weights also contain the full weights.
        optimizer: a name in videox.optim.registry.OPTIMIZERS.
        lora_rank: rank of the LoRA that is trained, 0 trains the model itself. With a LoRA the base model is frozen,
            and stored in the computing dtype except under FSDP1 (float32).
        vae_mini_batch: clips per call of the VAE.
        cached: the outputs of the encoders come from a latent cache (--latent_cache).
        accumulation: micro-batches per step and process.
        keep: what recomputed blocks keep (--gradient_checkpointing_keep), "" for nothing.
        offload_activations: inputs of recomputed blocks are in host memory between the passes.
        base_precision: of the frozen linear layers of the blocks under a LoRA (--base_precision).
        streamed: number of blocks whose weights stay in host memory, and their gradients if they are trained
            (--stream_blocks).
        text_precision: of the linear layers of the text encoder's blocks (--text_encoder_precision).
        vae_tiled: the VAE encodes in tiles (--vae_tiling).
        sampled_with: bytes of a second transformer in host memory, for sample clips; 0 without one.
    """

    backend: str
    processes: int
    per_host: int
    half: bool
    recompute_share: float
    offload_encoders: bool
    workers: int
    tokens: int
    batch: int
    zero: Mapping[str, Any]
    ema_device: str = ""
    full_weights: bool = False
    optimizer: str = "adamw"
    lora_rank: int = 0
    vae_mini_batch: int = 1
    cached: bool = False
    accumulation: int = 1
    keep: str = ""
    offload_activations: bool = False
    base_precision: str = BF16
    streamed: int = 0
    text_precision: str = BF16
    vae_tiled: bool = False
    sampled_with: int = 0

    @property
    def lora(self) -> bool:
        """Whether a LoRA is trained."""
        return self.lora_rank > 0

    @property
    def streams(self) -> bool:
        """Whether blocks can be streamed if they are recomputed; trained ones need an optimizer in host memory."""
        trained = kind_of(self.optimizer).on_host and self.backend == "single" and self.ema_device != "accelerator"
        return self.backend in UNSHARDED if self.lora else trained

    @property
    def frozen_bytes(self) -> int:
        """Bytes of a frozen weight, except under DeepSpeed, which stores its own."""
        fp32_weights = kind_of(self.optimizer).fp32_params and not self.lora
        return 2 if self.half and not fp32_weights and self.backend != "fsdp1" else 4

    def offloads(self, what: str) -> bool:
        """Return whether DeepSpeed offloads "optimizer" or "param" to the host."""
        device = (self.zero.get(f"offload_{what}") or {}).get("device", "none")
        return self.backend.startswith("zero") and device != "none"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its GPU and of one machine on its host.

    States are allocated all the time; of the phases (training, encoding, optimizer step) one runs at a time.
    """

    states: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    host: Mapping[str, float]

    def total(self) -> float:
        """Return the peak bytes on a GPU."""
        return self.allocated() * (1 + FRAGMENTATION) + CONTEXT

    def host_peak(self) -> float:
        """Return the most bytes of host memory on one machine: while loading, or while training."""
        return peak_of_host(self.host)

    def of_phases(self, *names: str) -> float:
        """Return the peak bytes on a GPU in some phases."""
        return replace(self, phases={name: self.phases[name] for name in names}).total()

    def only(self, phase: str | None) -> Memory:
        """Return the memory with one phase alone (a key of `phases`; "states" = without any); None = with all."""
        if phase is None:
            return self
        return replace(self, phases={phase: self.phases.get(phase, {})})

    def without(self, phase: str) -> Memory:
        """Return the memory without one phase."""
        return replace(self, phases={name: sizes for name, sizes in self.phases.items() if name != phase} or {"": {}})

    def allocated(self) -> float:
        """Return the most bytes of tensors on a GPU: without the CUDA context and fragments."""
        return sum(self.states.values()) + max(sum(phase.values()) for phase in self.phases.values())

    def at_peak(self) -> dict[str, float]:
        """Return the items that are allocated at the peak: states, the largest phase, context and fragments."""
        largest = max(self.phases.values(), key=lambda phase: sum(phase.values()))
        items = self.items()
        names = (*self.states, *largest, "context", "fragments")
        return {name: items[name] for name in names if items[name]}

    def items(self) -> dict[str, float]:
        """Return every item, and the total; the names are keys of plan_report.json."""
        by_phase = {name: size for phase in self.phases.values() for name, size in phase.items()}
        fragments = self.total() - CONTEXT - (self.total() - CONTEXT) / (1 + FRAGMENTATION)
        return {**self.states, **by_phase, "context": CONTEXT, "fragments": fragments, "total": self.total()}


class FrozenBytes(NamedTuple):
    """Bytes of the frozen weights of one process: of those that stay on the GPU, of a streamed block, at rest."""

    resident: float
    streamed_block: float
    resting: float

    def on_device(self) -> tuple[float, float]:
        """Return the bytes on the GPU: of what stays, and of the buffers of streamed blocks."""
        return self.resident, ON_DEVICE * self.streamed_block


def frozen_bytes(parameters: Parameters, setup: MemorySetup) -> FrozenBytes:
    """Return the bytes of the frozen weights of a backend that replicates them, or of all shards together."""
    sizes = [block.bytes_in(setup.base_precision, setup.frozen_bytes) for block in parameters.blocks]
    in_blocks = sum(block.frozen for block in parameters.blocks)
    other = setup.frozen_bytes * (parameters.total - parameters.trainable - in_blocks)
    resting = [sizes[number] for number in _streamed_blocks(parameters, setup)]
    return FrozenBytes(other + sum(sizes) - sum(resting), max(resting, default=0.0), sum(resting))


def _streamed_blocks(parameters: Parameters, setup: MemorySetup) -> list[int]:
    count = len(parameters.blocks)
    return select_blocks(count, setup.streamed / count) if setup.streamed else []


class TrainedElements(NamedTuple):
    """Parameters that get gradients, of streamed blocks: the numbers of all, and of the largest block."""

    resting: int
    block: int


def streamed_trained(parameters: Parameters, setup: MemorySetup) -> TrainedElements:
    """Return the trained parameters whose weights and gradients rest in host memory; none with a LoRA."""
    counts = [parameters.blocks[number].trained for number in _streamed_blocks(parameters, setup)]
    return TrainedElements(sum(counts), max(counts, default=0))


def state_bytes(parameters: Parameters, setup: MemorySetup) -> dict[str, float]:
    """Return weights, fp32 parameters ("masters"), gradients and optimizer state of one process on its GPU, by engine.

    The trainable parameters are float32, except for optimizers with stochastic rounding. Under DDP and FSDP the
    weights themselves are these parameters; DeepSpeed stores bfloat16 weights in addition. AdamW has two float32
    moments for each trainable parameter.
    """
    total, trainable, share = parameters.total, parameters.trainable, 1 / setup.processes
    if setup.backend in UNSHARDED or setup.backend.startswith("fsdp"):
        optimizer, sharding = kind_of(setup.optimizer), 1.0 if setup.backend in UNSHARDED else share
        resting, block = streamed_trained(parameters, setup)
        trained = optimizer.weight_bytes * (trainable - resting + ON_DEVICE * block)
        sizes = {"weights": sum(frozen_bytes(parameters, setup).on_device()) + trained, "masters": 0}
        # FSDP1 flattens a block into one tensor: if a part of the block trains, the gradient of all of it is allocated
        with_gradients = total - parameters.outside if setup.backend == "fsdp1" and trainable < total else trainable
        with_gradients += GRADIENT_COPIES * block - resting
        sizes |= {
            "gradients": optimizer.weight_bytes * with_gradients,
            "optimizer": optimizer.moment_bytes * trainable,
        }
        return {name: sharding * size for name, size in sizes.items()}
    weights = (2.0 if setup.half else 4.0) * total * (share if setup.backend == "zero3" else 1)
    sharded = {"masters": 4.0 * trainable, "gradients": 4.0 * trainable, "optimizer": 8.0 * trainable}
    states = {"weights": weights, **{name: size * share for name, size in sharded.items()}}
    if setup.offloads("optimizer"):
        states |= {"masters": 0.0, "gradients": 0.0, "optimizer": 0.0}
    if setup.offloads("param"):
        states["weights"] = 0.0
    return states


def communication_bytes(parameters: Parameters, setup: MemorySetup) -> float:
    """Return the bytes of a backend's buffers for computing and communication: gathers, buckets, casts."""
    size = 2 if setup.half else 4
    if setup.backend in UNSHARDED:
        weight = kind_of(setup.optimizer).weight_bytes
        # autocast keeps bfloat16 copies of float32 weights for the length of a forward pass
        frozen = parameters.total - parameters.trainable
        resting, block = streamed_trained(parameters, setup)
        trainable = parameters.trainable - resting + block  # of a streamed block while it runs
        cast_elements = trainable * (weight == 4) + frozen * (setup.frozen_bytes == 4)
        weight_copies = 2 * cast_elements if setup.half else 0
        # Gradients are views of DDP's buckets, except those of a step's earlier micro-batches, which are not reduced.
        has_both = setup.backend == "ddp" and setup.accumulation > 1
        buckets = weight * parameters.trainable if has_both else 0
        # the weight of the layer that runs, in the dtype of computation
        largest = max((block.largest for block in parameters.blocks), default=0)
        dequantised = size * largest * (setup.base_precision != BF16)
        return float(weight_copies + buckets + dequantised)
    share = 1 / setup.processes
    if setup.backend.startswith("fsdp"):
        # the next block is gathered during the current one; a block's gradients are cast for their reduction
        gathered = parameters.outside + 2 * parameters.block
        return gathered * size * (1 + share) + parameters.block * (size + 4)
    bucket = min(int(_number(setup.zero, "reduce_bucket_size", REDUCE_BUCKET)), parameters.trainable)
    if setup.backend == "zero2":
        buffers = 2 if setup.zero.get("overlap_comm", True) else 1
        return buffers * bucket * size + 2.0 * parameters.block * size
    live_parameters = int(_number(setup.zero, "stage3_max_live_parameters", LIVE_PARAMETERS))
    live_parameters += int(_number(setup.zero, "stage3_prefetch_bucket_size", PREFETCH_BUCKET))
    return (min(max(live_parameters, parameters.block), parameters.total) + bucket + parameters.block) * float(size)


def _number(zero: Mapping[str, Any], name: str, default: float) -> float:
    value = zero.get(name, default)
    return default if value == "auto" else float(value)


def memory_of(parameters: Parameters, network: Network, encoders: Encoders, setup: MemorySetup) -> Memory:
    """Return the memory of a run with this setup."""
    states = state_bytes(parameters, setup)
    if setup.ema_device == "accelerator":
        states["average"] = _sharded_bytes(4.0 * parameters.trainable, setup)
    if not setup.offload_encoders and not setup.cached:
        states["encoders"] = float(encoders.total())
    recomputed_blocks = select_blocks(len(network.blocks), setup.recompute_share) if setup.recompute_share else []
    offloaded = network.offloaded_bytes(setup.tokens, recomputed_blocks) if setup.offload_activations else []
    on_device = network.peak_bytes(setup.tokens, recomputed_blocks, setup.keep)
    on_device -= sum(sorted(offloaded)[:-COPIES_ON_DEVICE])
    training = {
        "activations": setup.batch * on_device,
        "communication": communication_bytes(parameters, setup),
    }
    encoding = {"encoding": _encoding_bytes(encoders, setup, sum(states.values()))}
    step: dict[str, float] = {}
    if setup.backend == "zero3" and not setup.offloads("optimizer"):
        # ZeRO-3 flattens the gradients of a sub-group once more
        sub_group = int(_number(setup.zero, "sub_group_size", SUB_GROUP))
        step = {"optimizer step": 4.0 * min(parameters.trainable / setup.processes, sub_group)}
    host = host_bytes(parameters, encoders, setup)
    if offloaded:
        host["offloaded activations"] = setup.per_host * sum(pinned_bytes(setup.batch * size) for size in offloaded)
    return Memory(states, {"training": training, "encoding": encoding, "step": step}, host)


def peak_of_host(host: Mapping[str, float]) -> float:
    """Return the most bytes of the items of Memory.host at a time: while loading, or while training."""
    return max(host["loading"], sum(size for name, size in host.items() if name != "loading"))


def moved_to_host(host: Mapping[str, float]) -> dict[str, float]:
    """Return the items of Memory.host that flags move there from the GPU; not those of the encoders."""
    return {name: size for name, size in host.items() if name.startswith(("offloaded", "streamed")) and size}


def pinned_bytes(size: float) -> float:
    """Return the bytes of a pinned buffer: torch's allocator of pinned memory rounds up to a power of two."""
    return float(2 ** math.ceil(math.log2(size))) if size else 0.0


def _encoding_bytes(encoders: Encoders, setup: MemorySetup, states: float) -> float:
    """Return the bytes of the encoding phase, in addition to the states."""
    vae_peak = encoders.vae_peak * min(setup.vae_mini_batch, setup.batch)
    if not setup.offload_encoders:
        # With a cache the encoders run before the transformer is loaded, so that its states are not there yet.
        return max(encoders.total() + vae_peak - states, 0.0) if setup.cached else vae_peak
    # one encoder is on the GPU at a time while the next one is prefetched; after the VAE, the last, none is
    weights = encoders.weights
    with_next = [
        size + max((other for other_name, other in weights.items() if other_name != name), default=0)
        for name, size in weights.items()
        if name != "vae"
    ]
    peak = max([weights.get("vae", 0) + vae_peak, *with_next])
    return max(peak - states, 0.0) if setup.cached else peak


def _sharded_bytes(size: float, setup: MemorySetup) -> float:
    """Return the bytes per process of something that is sharded like the fp32 parameters."""
    return size if setup.backend in UNSHARDED else size / setup.processes


def host_bytes(parameters: Parameters, encoders: Encoders, setup: MemorySetup) -> dict[str, float]:
    """Return the bytes of host memory of one machine: while loading, and while training.

    Every process loads the whole transformer, in its final dtype, before it is moved or sharded; under ZeRO-3 and
    FSDP2 a process reads its own shard alone. Streamed blocks at rest, encoders and a second transformer are in shared
    memory, once for all processes of a machine.
    """
    count, trainable = setup.per_host, float(parameters.trainable)
    share = 1 / setup.processes if setup.backend in ("zero3", "fsdp2") else 1.0
    training = {
        "resting encoders": float(encoders.total()) if setup.offload_encoders and not setup.cached else 0.0,
        "workers": count * setup.workers * WORKER,
    }
    if setup.offloads("optimizer"):
        # fp32 parameters, gradients and two moments, 4 bytes each
        training["offloaded optimizer"] = count * 16 * trainable / setup.processes
    if kind_of(setup.optimizer).on_host:
        training["offloaded optimizer"] = count * kind_of(moments_of(setup.optimizer)).moment_bytes * trainable
    if setup.offloads("param"):
        training["offloaded weights"] = count * 2.0 * parameters.total / setup.processes
    if setup.streamed:
        trained = kind_of(setup.optimizer).weight_bytes * streamed_trained(parameters, setup).resting
        training["streamed blocks"] = frozen_bytes(parameters, setup).resting + trained
        if trained:
            training["streamed gradients"] = float(trained)
    if setup.sampled_with:
        training["other expert"] = float(setup.sampled_with)
    if setup.ema_device == "cpu":
        training["average"] = count * _sharded_bytes(4.0 * trainable, setup)
    loading = setup.frozen_bytes * parameters.total * share
    if setup.base_precision != BF16:  # a block is quantised when it was read
        frozen = frozen_bytes(parameters, setup)
        loading = frozen.resident + frozen.resting + kind_of(setup.optimizer).weight_bytes * trainable
    return {"loading": count * loading + encoders.total(), **training}


def checkpoint_size(parameters: Parameters, setup: MemorySetup) -> float:
    """Return the bytes of one checkpoint: weights and moments, and what DeepSpeed writes in addition.

    An EMA is one more copy of the saved weights; so are full weights where the backend's own are sharded. With a LoRA,
    the base model is not saved.
    """
    optimizer = kind_of(moments_of(setup.optimizer))
    plain = (optimizer.weight_bytes + optimizer.moment_bytes, setup.frozen_bytes)
    per_trainable, per_frozen = {"zero2": (18, 6), "zero3": (14, 2)}.get(setup.backend, plain)
    saved = parameters.trainable if setup.lora else parameters.total
    copies = int(bool(setup.ema_device)) + int(setup.full_weights and setup.backend in ("zero3", "fsdp1", "fsdp2"))
    main_copy = per_trainable * parameters.trainable + per_frozen * (saved - parameters.trainable)
    return float(main_copy + copies * 4 * saved)
