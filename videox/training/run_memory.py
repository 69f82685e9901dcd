"""The memory of a planned run, of the same run with changed settings, and the changes that would make it fit."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import largest_bucket
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.distributed.backends import BACKENDS, requested_engine
from videox.errors import UserError
from videox.estimate.activation_choice import CHOICES, choose_recompute
from videox.estimate.advice import LORA_RANKS, Proposal, SmallerSamples, possible_changes
from videox.estimate.duration import Speed
from videox.estimate.flops import Network
from videox.estimate.gpus import Gpu
from videox.estimate.host_limit import propose_on_host
from videox.estimate.memory import (
    SAFE_SHARE,
    UNSHARDED,
    BlockWeights,
    Encoders,
    Memory,
    MemorySetup,
    Parameters,
    memory_of,
)
from videox.estimate.model_profile import ModelProfile
from videox.estimate.module_facts import Modules
from videox.lora.targets import adapter_sizes, choose_targets
from videox.models.base_precision import BF16, INT8, NF4, QUANTISED_ENCODER, is_quantised, quantised_bytes
from videox.models.config_files import read_json
from videox.models.recompute import LEAST_STREAMED, Recompute, select_blocks
from videox.optim.registry import OPTIMIZERS
from videox.optim.selection import select_parameters
from videox.shapes import Bucket, token_count
from videox.training.args import optimizer_of
from videox.training.argument_parser import AUTO
from videox.training.planned_gpu import memory_limit
from videox.training.speed_flags import ALL

VAE_PARTS = 4  # parts of a clip on which the memory of a VAE that encodes clips part by part is measured
ROOT = Path(__file__).resolve().parents[2]
PER_HOST = 8  # processes per machine, unless the launcher says otherwise
SMALLER_SIZES = (832, 640, 512, 448, 384, 320, 256)  # target sizes in pixels that are proposed, the largest first
FEWER_FRAMES = (81, 49, 33, 17)


@dataclass(frozen=True)
class Launch:
    """What the launcher starts, or the dry run's flags state instead.

    Attributes:
        backend: name of a backend.
        processes: number of processes.
        per_host: processes on each machine.
        half: compute in bfloat16.
        zero: `zero_optimization` of the DeepSpeed configuration file.
    """

    backend: str
    processes: int
    per_host: int
    half: bool
    zero: Mapping[str, Any]


def launch_of(environment: Mapping[str, str], args: argparse.Namespace) -> Launch:
    """The launch to plan for: the launcher's variables, overridden by --dry_run_processes and --dry_run_backend."""
    kind, zero = requested_engine(environment), zero_settings(environment, args.dry_run_deepspeed_config)
    processes = args.dry_run_processes or int(environment.get("WORLD_SIZE", "1"))
    if kind == "deepspeed":
        backend = f"zero{zero.get('stage', environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2))}"
    else:
        backend = f"fsdp{environment.get('FSDP_VERSION', '1')}" if kind == "fsdp" else "single"
    if args.dry_run_backend == "single" and processes > 1:
        hint = "use --dry_run_backend ddp or --dry_run_processes 1"
        raise UserError("--dry_run_backend", f"single is one process, but {processes} are planned", hint)
    backend = args.dry_run_backend or backend
    if backend in ("single", "ddp"):
        backend = "ddp" if processes > 1 else "single"
    if backend not in BACKENDS:
        raise UserError("accelerate launch", f"{backend} is not supported", f"launch one of {', '.join(BACKENDS)}")
    precision = args.mixed_precision or environment.get("ACCELERATE_MIXED_PRECISION", "no")
    local = PER_HOST if args.dry_run_processes else int(environment.get("LOCAL_WORLD_SIZE", PER_HOST))
    return Launch(backend, processes, min(processes, local), precision == "bf16", zero)


def zero_settings(environment: Mapping[str, str], planned: str | None = None) -> Mapping[str, Any]:
    """`zero_optimization` of a DeepSpeed configuration file; {} without one.

    planned: the file to plan with, relative to the working directory or to this repository; None = the launcher's.
    """
    path = planned or environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if planned and not Path(planned).exists():
        path = str(ROOT / planned)
    return read_json(Path(path)).get("zero_optimization", {}) if path and path != "none" else {}


class RunMemory:
    """The memory of a run.

    Args:
        args: the flags.
        model: what the estimates know of the model.
        launch: what the launcher starts.
        columns, settings: of the plan.

    Attributes:
        setup: the settings that memory depends on, as the flags and the launch have them.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: ModelProfile,
        launch: Launch,
        columns: PlanColumns,
        settings: PlanSettings,
    ) -> None:
        self.args, self.model, self.columns, self.settings = args, model, columns, settings
        self.vae_half = args.vae_dtype == "bf16"
        self.largest = largest_bucket(columns, settings)
        self.setup = MemorySetup(
            backend=launch.backend,
            processes=launch.processes,
            per_host=launch.per_host,
            half=launch.half,
            recompute_share=1.0 if args.gradient_checkpointing else args.selective_ac,
            offload_encoders=args.low_vram,
            workers=args.dataloader_num_workers,
            tokens=token_count(self.largest, settings.policy.ratios),
            batch=args.train_batch_size,
            zero=launch.zero,
            ema_device=args.ema_device if args.use_ema else "",
            full_weights=args.save_whole_weights,
            optimizer=optimizer_of(args),
            lora_rank=args.lora_rank,
            vae_mini_batch=args.vae_mini_batch,
            cached=args.latent_cache is not None,
            # a slot that is filled by cost may have several micro-batches
            accumulation=max(args.gradient_accumulation_steps, 1 if args.slot_fill == "fixed" else 2),
            keep=args.gradient_checkpointing_keep or "",
            offload_activations=args.offload_activations,
            base_precision=args.base_precision,
            text_precision=args.text_encoder_precision,
            vae_tiled=args.vae_tiling,
            sampled_with=self._bytes_of_other(half=launch.half),
        )
        self.modules = Modules(model.components)
        self.parameters = cache(self._parameters)
        self._vae_peak = cache(self._measure_vae)
        if args.activation_memory:
            chosen = self.recompute_for(self.setup.batch, self.setup.tokens, memory_limit(args))
            self.setup = replace(self.setup, recompute_share=chosen.share, keep=chosen.keep)
        if args.stream_blocks:
            self.setup = replace(self.setup, streamed=self.streamed(memory_limit(args)))

    def _bytes_of_other(self, *, half: bool) -> int:
        """Return the bytes of a second transformer in the compute dtype, which a run with sample clips needs; or 0."""
        if self.model.other is None or not self.args.validation_prompts:
            return 0
        shapes = Modules({"transformer": self.model.other}).shapes()
        return (2 if half else 4) * sum(map(math.prod, shapes.values()))

    def network(self, setup: MemorySetup) -> Network:
        """Return FLOPs and activation bytes of the transformer in a setup."""
        cast = setup.backend in UNSHARDED and setup.frozen_bytes == 4
        return replace(self.model.network(half=setup.half, cast=cast), frozen=setup.lora)

    def memory(self, setup: MemorySetup) -> Memory:
        """Return the memory of the run with a setup."""
        return memory_of(self.parameters(setup.lora_rank), self.network(setup), self.encoders(setup), setup)

    def recompute_for(self, samples: int, tokens: int, limit: float) -> Recompute:
        """Return what --activation_memory auto recomputes in a micro-batch of so many samples and tokens of each.

        Args:
            samples: of the micro-batch.
            tokens: of each of them.
            limit: bytes of a GPU; 5 % of them are left free.
        """
        setup = replace(self.setup, batch=samples, tokens=tokens, recompute_share=0.0, keep="")

        def fits(choice: Recompute) -> bool:
            memory = self.memory(replace(setup, recompute_share=choice.share, keep=choice.keep))
            return memory.of_phases("training", "step") <= SAFE_SHARE * limit

        keeps = BACKENDS[setup.backend].keeps_attention
        return choose_recompute(self.network(setup), tokens, fits, [c for c in CHOICES if keeps or not c.keep])

    def streamed(self, limit: float) -> int:
        """Return the number of blocks that --stream_blocks streams.

        Args:
            limit: bytes of a GPU; auto streams as few blocks as fit in it with 5 % left free, or all of them.
        """
        blocks = len(self.parameters(self.setup.lora_rank).blocks)
        if self.args.stream_blocks != AUTO:
            return blocks if self.args.stream_blocks == ALL else min(self.args.stream_blocks, blocks)
        for count in (0, *range(LEAST_STREAMED, blocks)):
            if self.memory(replace(self.setup, streamed=count)).total() <= SAFE_SHARE * limit:
                return count
        return blocks

    def recomputed_flops(self, limit: float) -> Callable[[int], float]:
        """Return the FLOPs that are recomputed for a sample of so many tokens, as a function."""
        network, setup = self.network(self.setup), self.setup

        def flops(tokens: int) -> float:
            choice = Recompute(setup.recompute_share, setup.keep)
            if self.args.activation_memory and BACKENDS[setup.backend].recomputes_alone:
                choice = self.recompute_for(setup.batch, tokens, limit)
            return network.recompute(tokens, select_blocks(len(network.blocks), choice.share), choice.keep)

        return flops

    def encoders(self, setup: MemorySetup) -> Encoders:
        """Return the bytes of the frozen encoders: VAE in --vae_dtype, images in float32, text in the compute dtype.

        The linear layers of the text encoder's blocks are in --text_encoder_precision.

        The VAE's activations are measured on the largest sample of the plan, and proportional to smaller ones.
        """
        in_half = {"text": setup.half, "vae": self.vae_half}
        weights = {
            name: (2 if in_half.get(name.partition("_")[0]) else 4) * self.modules.elements(name)
            for name in self.modules.frozen()
        }
        if setup.text_precision != BF16 and QUANTISED_ENCODER in weights:
            elements, rows = self.modules.text_linear()
            weights[QUANTISED_ENCODER] += round(quantised_bytes(setup.text_precision, elements, rows)) - 2 * elements
        return Encoders(weights, self._vae_peak(setup.vae_tiled) * setup.tokens / self.setup.tokens)

    def proposals(self, limit: float, phase: str | None = None, host: float = math.inf) -> list[Proposal]:
        """Return changes after which the run fits in `limit` bytes of a GPU with a margin.

        Args:
            limit: bytes of a GPU.
            phase: the phase of `Memory.phases` that must fit; None: all.
            host: bytes of host memory of a machine, in which the proposals fit where any does.
        """
        changes = possible_changes(
            self.setup,
            sharded_backend=self.model.sharded_backend,
            smaller=list(self._smaller_samples()),
            installed=lambda name: find_spec(OPTIMIZERS[name].module) is not None,
            accumulation=self.args.gradient_accumulation_steps,
            blocks=len(self.parameters(self.setup.lora_rank or LORA_RANKS[0]).blocks),
        )
        if self.args.activation_memory:  # which has chosen already what is recomputed
            chosen = ("--gradient_checkpointing", "--offload_activations", "--stream_blocks")
            changes = [change for change in changes if not change.flags.startswith(chosen)]
        if self.args.selective_ac:  # which streamed blocks exclude
            changes = [change for change in changes if not change.flags.startswith("--stream_blocks")]
        if self.args.lora_type == "dora" or self.args.compile:  # which need the weights as they are
            changes = [
                change for change in changes if not change.flags.startswith(("--stream_blocks", "--base_precision"))
            ]
        return propose_on_host(
            self.setup, SAFE_SHARE * limit, host, lambda setup: self.memory(setup).only(phase), changes
        )

    def less_host(self, limit: float) -> dict[str, float]:
        """Return the host memory of a machine after each single change that may need less of it, by its flags.

        Blocks stay streamed where they would not fit in `limit` bytes of a GPU.
        """
        setup, args = self.setup, self.args
        changed = {"--dataloader_num_workers 1": replace(setup, workers=min(setup.workers, 1))}
        for precision in (INT8, NF4) if setup.half else ():
            changed[f"--text_encoder_precision {precision}"] = replace(setup, text_precision=precision)
            if setup.lora and setup.backend in UNSHARDED and args.lora_type == "lora" and not args.compile:
                changed[f"--base_precision {precision}"] = replace(setup, base_precision=precision)
        if setup.sampled_with:
            changed["without --validation_prompts"] = self.without_samples()
        resident = replace(setup, streamed=0)
        if setup.streamed and self.memory(resident).total() <= SAFE_SHARE * limit:
            changed["without --stream_blocks"] = resident
        return {flags: self.memory(other).host_peak() for flags, other in changed.items()}

    def without_samples(self) -> MemorySetup:
        """Return the setup of the same run without sample clips, which need host memory for a second transformer."""
        return replace(self.setup, sampled_with=0)

    def encoding_seconds(self, plan: EpochPlan, speed: Speed) -> float:
        """Return the time of encoding the clips (--vae_dtype) and captions (compute dtype) of an epoch on one GPU."""
        counts = np.bincount(np.repeat(plan.micro_bucket, np.diff(plan.micro_first)), minlength=len(plan.buckets))
        pixels = sum(count * math.prod(bucket) for count, bucket in zip(counts.tolist(), plan.buckets, strict=True))
        text = self.modules.text_flops(self.args.tokenizer_max_length) * int(counts.sum())
        text_seconds = speed.seconds(text) if self.setup.half else speed.float32_seconds(text)
        vae = self.modules.vae_flops_per_pixel() * pixels
        vae_seconds = speed.seconds(vae) if self.vae_half else speed.convolution_seconds(vae)
        return vae_seconds + text_seconds + self._copy_seconds(len(plan.micro_bucket), speed.gpu)

    def _copy_seconds(self, micro_batches: int, gpu: Gpu) -> float:
        """Return the time in which GPUs wait for encoders that --low_vram copies for each micro-batch.

        The first encoder, of text and the largest, is waited for; the others are copied while it computes.
        """
        if not self.setup.offload_encoders or self.setup.cached:
            return 0.0
        return micro_batches * max(self.encoders(self.setup).weights.values()) / gpu.host_bandwidth

    def _measure_vae(self, tiled: bool) -> float:
        height, width = self.largest.height, self.largest.width
        given = 4 + (2 if self.vae_half else 0)  # the video is there in float32, and in the VAE's dtype too

        def peak(frames: int) -> float:
            size = (frames, height, width)
            activations = self.modules.vae_peak(size, half=self.vae_half, tiled=tiled)
            return activations + given * 3 * math.prod(size)

        frames, part = self.largest.frames, self.model.vae_frames
        if not part or frames <= 1 + VAE_PARTS * part:
            return peak(frames)
        # from the third part on, each one adds the same: its pixels and its latents
        shorter, longer = (peak(1 + number * part) for number in (VAE_PARTS - 1, VAE_PARTS))
        return longer + (longer - shorter) * ((frames - 1) / part - VAE_PARTS)

    def _parameters(self, lora_rank: int) -> Parameters:
        args, shapes = self.args, self.modules.shapes()
        sizes = dict[tuple[str, ...], int]()  # elements by block, such as ("blocks", "3"); (): outside of them
        linear = dict[tuple[str, ...], list[tuple[int, ...]]]()  # shapes of what --base_precision quantises
        for name, shape in shapes.items():
            block = tuple(name.split(".")[:2])
            block = block if block[0] in self.model.blocks else ()
            sizes[block] = sizes.get(block, 0) + math.prod(shape)
            linear.setdefault(block, []).extend([shape] * is_quantised(name, shape))
        everything, outside = sum(sizes.values()), sizes.pop((), 0)
        order = sorted(sizes, key=lambda block: ([*self.model.blocks].index(block[0]), int(block[1])))
        if lora_rank:
            targets = choose_targets(shapes, self.model.blocks, args.lora_target_modules)
            trained = sum(adapter_sizes(shapes, targets, lora_rank, dora=args.lora_type == "dora").values())
            blocks = tuple(_block_weights(sizes[block], linear[block]) for block in order)
            return Parameters(everything + trained, trained, max(sizes.values()), outside, blocks)
        selected = select_parameters(list(shapes), args.trainable_modules, args.trainable_modules_low_learning_rate)
        counts = Counter[tuple[str, ...]]()
        for name in (name for names in selected for name in names):
            counts[tuple(name.split(".")[:2])] += math.prod(shapes[name])
        blocks = tuple(replace(_block_weights(sizes[block], linear[block]), trained=counts[block]) for block in order)
        return Parameters(everything, sum(counts.values()), max(sizes.values()), outside, blocks)

    def _smaller_samples(self) -> Iterator[SmallerSamples]:
        """Yield flags for smaller target sizes and, at the smallest of them, for fewer frames."""
        policy = self.settings.policy
        if policy.fix_sample_size is not None:
            return
        names = ("token_sample_size", "video_sample_size", "image_sample_size")
        flags, size = "", policy.token_sample_size
        for size in (size for size in SMALLER_SIZES if size < policy.token_sample_size):
            changed = {name: min(getattr(policy, name), size) for name in names}
            flags = " ".join(f"--{name} {value}" for name, value in changed.items() if value != getattr(policy, name))
            yield SmallerSamples(flags, self._tokens_of(**changed))
        smallest = {name: min(getattr(policy, name), size) for name in names}
        for frames in (frames for frames in FEWER_FRAMES if frames < policy.n_frames):
            yield SmallerSamples(
                f"{flags} --video_sample_n_frames {frames}".strip(), self._tokens_of(**smallest, n_frames=frames)
            )

    def _tokens_of(self, **changes: Any) -> int:  # noqa: ANN401 - fields of SizePolicy
        policy = replace(self.settings.policy, **changes)
        return token_count(largest_bucket(self.columns, replace(self.settings, policy=policy)), policy.ratios)


def _block_weights(elements: int, linear: Sequence[tuple[int, ...]]) -> BlockWeights:
    counts = [math.prod(shape) for shape in linear]
    return BlockWeights(elements, sum(counts), sum(rows for rows, _ in linear), max(counts, default=0))


def largest_micro_batches(plan: EpochPlan) -> dict[Bucket, int]:
    """The samples of the largest micro-batch of each bucket of an epoch."""
    samples = np.zeros(len(plan.buckets), np.int64)
    np.maximum.at(samples, plan.micro_bucket, np.diff(plan.micro_first))
    return {bucket: int(count) for bucket, count in zip(plan.buckets, samples, strict=True) if count}


def chooser(run: RunMemory, limit: float, *, alone: bool) -> Callable[[int, int], Recompute]:
    """What to recompute, as a function of samples and tokens; alone: see Backend.recomputes_alone."""
    largest = run.setup.batch, run.setup.tokens
    choose = cache(lambda samples, tokens: run.recompute_for(samples, tokens, limit))
    return choose if alone else lambda *_: choose(*largest)
