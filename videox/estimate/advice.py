"""Which changed settings make a run fit in a GPU's memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from videox.estimate.memory import BY_SHARDING, UNSHARDED, Memory, MemorySetup
from videox.models.base_precision import BF16, FP8, INT8, NF4
from videox.models.recompute import LEAST_STREAMED
from videox.optim.registry import OPTIMIZERS, kind_of, moments_of

# What a change costs, in the order in which changes are considered. A later group is only used where the earlier ones
# together are not enough.
FREE, TIME, HOST, ROUNDING, OTHER_TRAINING, MORE_GPUS = range(6)
LORA_RANKS = (32, 16, 8, 4)
OF_LORA = ("--lora_rank", "--offload_activations", "--stream_blocks", "--base_precision")
TEXT, TILES = "--text_encoder_precision", "--vae_tiling"
GPU_COUNTS = (2, 4, 8, 16, 32, 64)
PER_HOST = 8  # GPUs of a machine
OFFLOAD_CONFIG = "config/zero_stage3_config_cpu_offload.json"


@dataclass(frozen=True)
class Change:
    """One setting to change.

    Attributes:
        group: what kind of cost it has: FREE, TIME, HOST, ROUNDING (of frozen weights), OTHER_TRAINING or MORE_GPUS.
        flags: the flags that make the change, as typed.
        effect: what it costs, in words.
        apply: returns the changed setup; None where it changes nothing or is not possible.
    """

    group: int
    flags: str
    effect: str
    apply: Callable[[MemorySetup], MemorySetup | None]


@dataclass(frozen=True)
class AppliedChange:
    """A change in a proposal, with the memory after it and all before it.

    Attributes:
        change: the change.
        setup: with the changes.
        total: bytes on a GPU.
        host: bytes of host memory per machine, by item.
    """

    change: Change
    setup: MemorySetup
    total: float
    host: Mapping[str, float]


@dataclass(frozen=True)
class Proposal:
    """Changes that together make a run fit, or, where nothing does, those with the least memory.

    Attributes:
        changes: in order of their cost.
        fits: whether the run fits with them.
        filled: it fits if the latent cache was filled before, on a CPU or a larger GPU: no encoder runs.
    """

    changes: tuple[AppliedChange, ...]
    fits: bool
    filled: bool = False

    @property
    def flags(self) -> str:
        """All flags of the proposal."""
        return " ".join(applied.change.flags for applied in self.changes)


@dataclass(frozen=True)
class SmallerSamples:
    """Flags that make the largest sample smaller; tokens: of that sample."""

    flags: str
    tokens: int


def propose(
    setup: MemorySetup, limit: float, memory: Callable[[MemorySetup], Memory], changes: Sequence[Change]
) -> list[Proposal]:
    """Return proposals after which a run fits: the cheapest, and where that trains something else, one with more GPUs.

    Within the groups up to one kind of cost, a single change that fits is preferred to several; several are added in
    order of their cost, without those that are not necessary. Where nothing fits, the first proposal is the smallest
    setup that was found; another one follows if the encoders alone are what does not fit.

    Args:
        setup: that does not fit.
        limit: bytes of a GPU.
        memory: returns the memory of a setup.
        changes: that may be made, in order of their cost.
    """
    found = _cheapest(setup, limit, memory, changes)
    if not found or found[0].changes[-1].change.group >= HOST:
        # without other optimizers: those with smaller moments do not work with the backends that shard the most
        kept = [c for c in changes if c.group in (FREE, TIME, MORE_GPUS) and not c.flags.startswith("--optimizer")]
        with_more = _search(setup, limit, memory, kept)
        if with_more.fits:
            found.append(with_more)
    return found or [_search(setup, limit, memory, list(changes)), *_with_filled_cache(setup, limit, memory, changes)]


def _cheapest(
    setup: MemorySetup, limit: float, memory: Callable[[MemorySetup], Memory], changes: Sequence[Change]
) -> list[Proposal]:
    """Return the proposal that fits with the cheapest kind of changes on the same GPUs, or none."""
    searches = [[change for change in changes if change.group <= group] for group in range(MORE_GPUS)]
    # Before other changes of the training: a LoRA with streamed or quantised weights, which is not for backends that
    # shard. The changes above would use these first.
    if any(change.group == OTHER_TRAINING and change.flags.startswith(OF_LORA[1:]) for change in changes):
        searches.insert(OTHER_TRAINING, [change for change in changes if _is_for_one_gpu(change)])
    for allowed in searches:
        proposal = _search(setup, limit, memory, allowed)
        if proposal.fits:
            return [proposal]
    return []


def _is_for_one_gpu(change: Change) -> bool:
    """Return whether a change may be made for a LoRA with all weights on one GPU, streamed or quantised."""
    if change.group == OTHER_TRAINING:
        return change.flags.startswith(OF_LORA)
    if change.group == ROUNDING:
        return change.flags.startswith((TEXT, TILES))
    return change.group <= TIME and not change.flags.startswith(("accelerate launch", "--optimizer"))


def _with_filled_cache(
    setup: MemorySetup, limit: float, memory: Callable[[MemorySetup], Memory], changes: Sequence[Change]
) -> list[Proposal]:
    """Return what fits if the latent cache was filled before, so that no encoder runs on these GPUs."""
    filled = replace(setup, cached=True)

    def without_encoding(changed: MemorySetup) -> Memory:
        return memory(changed).without("encoding")

    if without_encoding(filled).total() <= limit:
        return [Proposal((), True, filled=True)]
    return [replace(found, filled=True) for found in _cheapest(filled, limit, without_encoding, changes)]


def _search(
    setup: MemorySetup, limit: float, memory: Callable[[MemorySetup], Memory], changes: Sequence[Change]
) -> Proposal:
    for change in changes:
        single = _apply(setup, memory, [change])
        if single and single[-1].total <= limit:
            return Proposal(tuple(single), True)
    used: list[Change] = []
    applied: list[AppliedChange] = []
    reduced = True
    while reduced:  # a change of a phase that was not the largest one may reduce the total after others did
        reduced = False
        for change in (change for change in changes if change not in used):
            before = applied[-1].total if applied else memory(setup).total()
            # a backend may not work with an optimizer that was changed before
            for kept in (used, [other for other in used if not other.flags.startswith("--optimizer")]):
                more = sorted([*kept, change], key=changes.index)
                tried = _apply(setup, memory, more)
                if len(tried) == len(more) and tried[-1].total < before:
                    used, applied, reduced = more, tried, True
                    break
            if applied and applied[-1].total <= limit:
                return Proposal(tuple(_without_unnecessary(setup, limit, memory, used)), True)
    if applied:  # without changes that a later one has replaced, such as another optimizer
        applied = _without_unnecessary(setup, applied[-1].total, memory, used)
    return Proposal(tuple(applied), False)


def _without_unnecessary(
    setup: MemorySetup, limit: float, memory: Callable[[MemorySetup], Memory], used: Sequence[Change]
) -> list[AppliedChange]:
    """Return the changes that are needed: each is left out where the run fits without it, the most expensive first."""
    needed = list(used)
    for change in reversed(used):
        fewer = [other for other in needed if other is not change]
        tried = _apply(setup, memory, fewer)
        if len(tried) == len(fewer) and tried and tried[-1].total <= limit:
            needed = fewer
    return _apply(setup, memory, needed)


def _apply(
    setup: MemorySetup, memory: Callable[[MemorySetup], Memory], changes: Sequence[Change]
) -> list[AppliedChange]:
    """Return the changes that can be made, each with the memory after it."""
    applied = []
    for change in changes:
        changed = change.apply(setup)
        if changed is not None:
            setup = changed
            needed = memory(setup)
            applied.append(AppliedChange(change, setup, needed.total(), needed.host))
    return applied


def possible_changes(
    setup: MemorySetup,
    *,
    sharded_backend: str,
    smaller: Sequence[SmallerSamples],
    installed: Callable[[str], bool],
    accumulation: int = 1,
    blocks: int = 0,
) -> list[Change]:
    """Return the changes that a run may make, in order of their cost.

    Args:
        setup: of the run.
        sharded_backend: the backend of the family that shards the weights.
        smaller: flags of smaller samples, the largest first.
        installed: whether an optimizer's package is installed.
        accumulation: micro-batches per step (--gradient_accumulation_steps).
        blocks: repeated blocks of the model, which may be streamed; 0: none.
    """
    accumulate = f" --gradient_accumulation_steps {setup.batch * accumulation}"
    free = [
        Change(FREE, "--low_vram", "encoders are in host memory while they are not used", _offload_encoders),
        Change(FREE, "--vae_mini_batch 1", "the VAE encodes one clip at a time", _single_clip),
        Change(FREE, "--mixed_precision bf16", "computes in bfloat16", _half),
        Change(FREE, f"--train_batch_size 1{accumulate}", "the same samples per step, one at a time", _single_sample),
        Change(FREE, "--latent_cache DIR", "encoders run once, before the training; needs disk", _cache),
    ]
    recompute = "--gradient_checkpointing" + (" --selective_ac 0" if setup.recompute_share else "")
    time = [Change(TIME, recompute, "recomputes activations: about a third more time per step", _recompute)]
    for name in ("adamw8bit", "adamw_bf16", "adamw8bit_bf16"):
        effect = "8-bit moments" if "8bit" in name else "bfloat16 weights with stochastic rounding"
        if name == "adamw8bit_bf16":
            effect = "bfloat16 weights with stochastic rounding, 8-bit moments"
        if installed(name):
            time.append(Change(TIME, f"--optimizer {name}", effect, partial(_use_optimizer, name=name)))
    for backend in ("zero2", sharded_backend, "fsdp2"):
        words = _launch(backend, setup.processes, setup.half)
        time.append(Change(TIME, words, "shards the run over the GPUs", partial(_shard, backend=backend)))
    host = [*_of_frozen_weights(HOST, blocks), *_offloads(setup, installed, blocks)]
    rounding = _of_frozen_weights(ROUNDING, blocks)
    # every backend trains a LoRA with AdamW; the adapters are so small that other moments save little
    adamw = "" if setup.lora or setup.optimizer == "adamw" else " --optimizer adamw"
    other = [
        Change(
            OTHER_TRAINING,
            f"--lora_rank {rank}{adamw}",
            _lora_effect(setup, rank),
            partial(_lora, rank=rank, named=setup.optimizer),
        )
        for rank in LORA_RANKS
    ]
    if not setup.lora:  # the changes above need a LoRA
        other += [replace(change, group=OTHER_TRAINING) for change in (*_of_frozen_weights(HOST, blocks), *rounding)]
    other += [
        Change(
            OTHER_TRAINING, samples.flags, f"samples of at most {samples.tokens:,} tokens", partial(_smaller, samples)
        )
        for samples in smaller
    ]
    return [*free, *time, *host, *_of_encoders(), *rounding, *other, *_on_more_gpus(setup, sharded_backend)]


def _of_encoders() -> list[Change]:
    """Return the changes that reduce the memory of encoding, and change its outputs slightly."""
    text = [
        Change(ROUNDING, f"{TEXT} {name}", f"text encoder in {bits} bits", partial(_quantise_text, precision=name))
        for name, bits in ((INT8, 8), (NF4, 4))
    ]
    return [*text, Change(ROUNDING, TILES, "the VAE encodes in tiles that overlap: slightly other latents", _tile)]


def _of_frozen_weights(group: int, blocks: int) -> list[Change]:
    """Return the changes of a group: offloaded inputs and streamed blocks (HOST), quantised ones (ROUNDING)."""
    if not blocks:
        return []
    if group == HOST:
        offload = "inputs of recomputed blocks are in host memory between the passes"
        stream = "weights of blocks stay in host memory and are copied when a block runs: bit-identical results"
        return [
            Change(HOST, "--offload_activations", offload, _offload_activations),
            Change(HOST, "--stream_blocks all", stream, partial(_stream, blocks=blocks)),
        ]
    effects = {
        INT8: "frozen weights in 8 bits (torchao): the start prints the error",
        NF4: "frozen weights in 4 bits (bitsandbytes): the start prints the error",
    }
    return [
        Change(ROUNDING, f"--base_precision {name}", effect, partial(_quantise, precision=name))
        for name, effect in effects.items()
    ]


def _offloads(setup: MemorySetup, installed: Callable[[str], bool], blocks: int) -> list[Change]:
    """Return the changes that move the optimizer, or weights and optimizer, to host memory."""
    host = list[Change]()
    named = [("adamw_offload", 0), ("adamw_bf16_offload", 0), *([("adamw_bf16_offload", blocks)] if blocks else [])]
    for name, streamed in ((name, streamed) for name, streamed in named if installed(name)):
        flags = f"--optimizer {name}" + (" --stream_blocks all" if streamed else "")
        effect = "the optimizer works in host memory: seconds more per step"
        effect += "; weights and gradients of blocks are there, too" if streamed else ""
        host.append(Change(HOST, flags, effect, partial(_offload_moments, name=name, streamed=streamed)))
    words = f"accelerate launch --use_deepspeed --deepspeed_config_file {OFFLOAD_CONFIG}"
    words += f" --num_processes {setup.processes}{_precision(setup.half)}"
    words += "" if _is_sharded_by_zero3(setup.optimizer) else " --optimizer adamw"
    effect = "weights and optimizer are in host memory: slower steps"
    host.append(Change(HOST, words, effect, partial(_offload_to_host, named=setup.optimizer)))
    return host


def _launch(backend: str, processes: int, half: bool) -> str:
    words = f"accelerate launch --config_file config/accelerate/{backend}.yaml --num_processes {processes}"
    return words + _precision(half)


def _precision(half: bool) -> str:
    """Return the flag for bfloat16, in which all launch configurations compute, where the run does not have it."""
    return "" if half else " --mixed_precision bf16"


def _on_more_gpus(setup: MemorySetup, sharded_backend: str) -> list[Change]:
    """Return the changes to more GPUs, under the backend that shards the most of the run's and the family's."""
    backend = max(setup.backend, sharded_backend, key=BY_SHARDING.index)
    optimizer = moments_of(setup.optimizer)
    if backend not in kind_of(optimizer).backends:
        backend = "fsdp2"  # the optimizers with smaller moments that can be sharded work with this one alone
    on_gpu = "" if optimizer == setup.optimizer else f" --optimizer {optimizer}"
    return [
        Change(
            MORE_GPUS,
            f"{_launch(backend, count, setup.half)}{on_gpu}",
            f"shards the run over {count} GPUs",
            partial(_more_gpus, count=count, backend=backend, named=setup.optimizer),
        )
        for count in GPU_COUNTS
    ]


def _offload_encoders(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, offload_encoders=True) if not setup.offload_encoders and not setup.cached else None


def _single_clip(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, vae_mini_batch=1) if min(setup.vae_mini_batch, setup.batch) > 1 else None


def _half(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, half=True) if not setup.half else None


def _single_sample(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, batch=1, accumulation=setup.accumulation * setup.batch) if setup.batch > 1 else None


def _cache(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, cached=True) if not setup.cached else None


def _recompute(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, recompute_share=1.0) if setup.recompute_share < 1 else None


def _offload_activations(setup: MemorySetup) -> MemorySetup | None:
    possible = setup.lora and setup.recompute_share > 0 and not setup.offload_activations
    return replace(setup, offload_activations=True) if possible else None


def _stream(setup: MemorySetup, blocks: int) -> MemorySetup | None:
    possible = setup.streams and setup.recompute_share == 1 and setup.streamed < blocks
    return replace(setup, streamed=blocks) if possible and blocks >= LEAST_STREAMED else None


def _quantise(setup: MemorySetup, precision: str) -> MemorySetup | None:
    smaller = (FP8, INT8, BF16).count(setup.base_precision) if precision == NF4 else setup.base_precision == BF16
    possible = setup.lora and setup.half and setup.backend in UNSHARDED
    return replace(setup, base_precision=precision) if possible and smaller else None


def _quantise_text(setup: MemorySetup, precision: str) -> MemorySetup | None:
    smaller = setup.text_precision != NF4 if precision == NF4 else setup.text_precision == BF16
    return replace(setup, text_precision=precision) if setup.half and smaller else None


def _tile(setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, vae_tiled=True) if not setup.vae_tiled else None


def _is_unsharded_only(setup: MemorySetup) -> bool:
    """Return whether the frozen weights are stored in a way that only backends without sharding know."""
    return bool(setup.streamed) or setup.base_precision != BF16


def _use_optimizer(setup: MemorySetup, name: str) -> MemorySetup | None:
    smaller = OPTIMIZERS[name].bytes_per_parameter < kind_of(setup.optimizer).bytes_per_parameter
    possible = setup.backend in OPTIMIZERS[name].backends and not setup.lora and (setup.half or name == "adamw8bit")
    return replace(setup, optimizer=name) if smaller and possible else None


def _shard(setup: MemorySetup, backend: str) -> MemorySetup | None:
    if backend not in kind_of(setup.optimizer).backends or setup.processes == 1 or _is_unsharded_only(setup):
        return None
    more = BY_SHARDING.index(backend) > BY_SHARDING.index(setup.backend)
    return replace(setup, backend=backend, half=True, zero={}) if more else None


def _offload_moments(setup: MemorySetup, name: str, streamed: int) -> MemorySetup | None:
    possible = setup.backend in OPTIMIZERS[name].backends and not setup.lora and name != setup.optimizer
    changed = replace(setup, optimizer=name) if possible and (setup.half or OPTIMIZERS[name].fp32_params) else None
    return _stream(changed, streamed) if changed and streamed else changed


def _is_sharded_by_zero3(optimizer: str) -> bool:
    return "zero3" in kind_of(optimizer).backends


def _offload_to_host(setup: MemorySetup, named: str) -> MemorySetup | None:
    done = setup.offloads("optimizer") and setup.offloads("param")
    possible = _is_sharded_by_zero3(setup.optimizer)
    if done or _is_unsharded_only(setup) or (not possible and setup.optimizer != named):
        return None  # flags name another optimizer already
    to_cpu = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    optimizer = setup.optimizer if possible else "adamw"
    return replace(setup, backend="zero3", half=True, zero=to_cpu, optimizer=optimizer)


def _lora_effect(setup: MemorySetup, rank: int) -> str:
    return (
        f"adapters of rank {rank} instead of {setup.lora_rank}" if setup.lora else "trains a LoRA, not the whole model"
    )


def _lora(setup: MemorySetup, rank: int, named: str) -> MemorySetup | None:
    if setup.lora and rank >= setup.lora_rank:
        return None
    if not setup.lora and named != "adamw" and setup.optimizer != named:
        return None  # flags name another optimizer already
    optimizer = setup.optimizer if setup.lora else "adamw"
    return replace(setup, lora_rank=rank, optimizer=optimizer)


def _smaller(samples: SmallerSamples, setup: MemorySetup) -> MemorySetup | None:
    return replace(setup, tokens=samples.tokens) if samples.tokens < setup.tokens else None


def _more_gpus(setup: MemorySetup, count: int, backend: str, named: str) -> MemorySetup | None:
    optimizer = moments_of(setup.optimizer)
    if count <= setup.processes or backend not in kind_of(optimizer).backends or _is_unsharded_only(setup):
        return None
    if setup.optimizer != named and kind_of(named).on_host:
        return None  # a LoRA, whose flags name an optimizer already
    # the launch's configuration file has DeepSpeed's default buffers and offloads nothing
    launched = replace(setup, backend=backend, processes=count, per_host=min(count, PER_HOST), zero={})
    return replace(launched, half=True, optimizer=optimizer)
