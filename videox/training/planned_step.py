"""The computed step of a planned run: its time, and what each further flag would give."""

from __future__ import annotations

import argparse
import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from videox.data.plan.epoch import EpochPlan
from videox.distributed.backends import BACKENDS
from videox.estimate.duration import Speed
from videox.estimate.epoch_time import EpochTime, FlagGain, epoch_time
from videox.estimate.memory import Encoders, MemorySetup, memory_of, moved_to_host
from videox.estimate.rates import Rates, kernel_of, rates_of
from videox.estimate.step_time import StepModel
from videox.models.base_precision import BF16, INT8, NF4
from videox.models.recompute import Recompute, select_blocks
from videox.shapes import Bucket
from videox.training.planned_gpu import gpu_of, memory_limit
from videox.training.run_memory import RunMemory

RECOMPUTE = "--gradient_checkpointing"
KEEP = "--gradient_checkpointing_keep"
LEAST_GAIN = 0.005  # share of a step below which another attention kernel is not proposed
FLASH3 = "flash3"


def micro_batches_of(plan: EpochPlan) -> Counter[tuple[Bucket, int]]:
    """The number of an epoch's micro-batches of each bucket and number of samples."""
    sizes = np.diff(plan.micro_first).tolist()
    return Counter(
        (plan.buckets[bucket], size) for bucket, size in zip(plan.micro_bucket.tolist(), sizes, strict=True)
    )


def rates(args: argparse.Namespace, half: bool, backend: str | None = None) -> Rates:
    """The assumed rates of the GPU to plan for; backend: instead of --attention_backend."""
    gpu, name = gpu_of(args)
    peak = None if args.peak_tflops is None else args.peak_tflops * 1e12
    return rates_of(gpu, name, peak=peak, backend=backend or args.attention_backend, half=half, tf32=args.allow_tf32)


class PlannedStep:
    """The step of a planned run.

    Args:
        args: the flags.
        run: memory of the run.
        plan: of the first epoch.
        speed: at which the encoders run.
        balance: share of the GPUs' time in which none waits for another, 0 to 1.

    Attributes:
        time: of the epoch.
        encoding: seconds of an epoch's encoding, on all GPUs.
    """

    def __init__(
        self, args: argparse.Namespace, run: RunMemory, plan: EpochPlan, speed: Speed, balance: float
    ) -> None:
        self.args, self.run, self.plan, self.speed, self.balance = args, run, plan, speed, balance
        self.limit = memory_limit(args)
        self._micro_batches = micro_batches_of(plan)
        self._automatic = bool(args.activation_memory) and BACKENDS[run.setup.backend].recomputes_alone
        self.time = self.time_with(run.setup)
        self.encoding = self._encoding(run)

    def time_with(self, setup: MemorySetup, *, compiled: bool | None = None, backend: str | None = None) -> EpochTime:
        """Return the time of an epoch with changed settings.

        Args:
            setup: of the run, or changed.
            compiled: instead of --compile.
            backend: instead of --attention_backend.
        """
        run, args = self.run, self.args
        network = run.network(setup)
        compiled = args.compile if compiled is None else compiled
        model = StepModel(
            network,
            run.parameters(setup.lora_rank),
            setup,
            rates(args, setup.half, backend),
            compiled,
            args.assumed_mfu,
        )

        def recompute(tokens: int) -> tuple[list[int], str]:
            choice = Recompute(setup.recompute_share, setup.keep)
            if self._automatic:
                choice = run.recompute_for(setup.batch, tokens, self.limit)
            return select_blocks(len(network.blocks), choice.share) if choice.share else [], choice.keep

        return epoch_time(model, self._micro_batches, recompute, self.plan.n_steps, self.balance, self.plan.ratios)

    def _encoding(self, run: RunMemory) -> float:
        return run.encoding_seconds(self.plan, self.speed) / run.setup.processes

    # ---------------------------------------------------------------------------------------------------- flags

    def gains(self) -> list[FlagGain]:
        """Return what each flag would give that applies and is not set; none where the MFU is assumed."""
        return [] if self.args.assumed_mfu is not None else [*self._of_training(), *self._of_encoding()]

    def _of_training(self) -> Iterator[FlagGain]:
        """Yield the flags that change forward and backward pass."""
        args, setup = self.args, self.run.setup
        backend = BACKENDS[setup.backend]
        if not args.activation_memory:
            if not setup.recompute_share:
                yield self._changed(RECOMPUTE, replace(setup, recompute_share=1.0))
            elif not setup.keep and backend.keeps_attention:
                for keep in ("attention", "self_attention"):
                    yield self._changed(f"{KEEP} {keep}", replace(setup, keep=keep))
            if setup.recompute_share and not setup.offload_activations:
                yield self._changed("--offload_activations", replace(setup, offload_activations=True))
        yield from self._of_block_weights()
        if not args.compile and backend.compiles:
            yield self._gain("--compile", self.time_with(setup, compiled=True), words="the first steps take minutes")
        if not setup.half:
            yield self._changed("--mixed_precision bf16", replace(setup, half=True))
        elif not args.deterministic and kernel_of(gpu_of(args)[0], args.attention_backend) != FLASH3:
            faster = self._gain(
                f"--attention_backend {FLASH3}", self.time_with(setup, backend=FLASH3), words="needs FlashAttention-3"
            )
            if faster.seconds < -LEAST_GAIN * self.time.step.total():
                yield faster

    def _of_block_weights(self) -> Iterator[FlagGain]:
        """Yield the flags that change where the weights of blocks are stored, and how the frozen ones under a LoRA."""
        args, setup = self.args, self.run.setup
        if BACKENDS[setup.backend].engine != "replicated" or args.compile:
            return
        blocks = len(self.run.parameters(setup.lora_rank).blocks)
        if setup.streams and args.gradient_checkpointing and not setup.streamed:
            yield self._changed("--stream_blocks all", replace(setup, streamed=blocks), words="bit-identical")
        if setup.lora and setup.base_precision == BF16 and setup.half and args.lora_type == "lora":
            for precision in (INT8, NF4):
                changed = replace(setup, base_precision=precision)
                yield self._changed(f"--base_precision {precision}", changed, words="rounded weights")

    def _of_encoding(self) -> Iterator[FlagGain]:
        """Yield the flags that change how clips and captions are encoded; with a cache it is done once."""
        run, steps = self.run, self.plan.n_steps
        setup = run.setup
        if setup.cached:
            return
        before = self.encoding
        cached = replace(setup, cached=True)
        yield self._changed(
            "--latent_cache DIR --cache_variants 1", cached, -before / steps, "encodes once, needs disk"
        )
        if not setup.offload_encoders:
            changed = copy.copy(run)
            changed.setup = replace(setup, offload_encoders=True)
            yield self._changed("--low_vram", changed.setup, (self._encoding(changed) - before) / steps)
        if not run.vae_half:
            changed = copy.copy(run)
            changed.vae_half = True
            # Half of the activations; the clip in float32 stays, and there is one in bfloat16, too.
            full, pixels = run.encoders(setup), 3 * math.prod(run.largest)
            encoders = Encoders(changed.encoders(setup).weights, full.vae_peak / 2 + 4 * pixels)
            memory = memory_of(run.parameters(setup.lora_rank), run.network(setup), encoders, setup)
            gpu = memory.total() - run.memory(setup).total()
            seconds = (self._encoding(changed) - before) / steps
            yield FlagGain("--vae_dtype bf16", seconds, gpu, words="slightly other latents")

    def _changed(self, flags: str, setup: MemorySetup, seconds: float = 0.0, words: str = "") -> FlagGain:
        """Return the gain of flags that change the setup; seconds: added to a step."""
        before, after = self.run.memory(self.run.setup), self.run.memory(setup)
        gain = self._gain(flags, self.time_with(setup), seconds, words)
        too_much = after.total() > self.limit >= before.total()
        words = "; ".join(part for part in (words, "does not fit any more" if too_much else "") if part)
        host = sum(moved_to_host(after.host).values()) - sum(moved_to_host(before.host).values())
        return replace(gain, gpu=after.total() - before.total(), host=host, words=words)

    def _gain(self, flags: str, time: EpochTime, seconds: float = 0.0, words: str = "") -> FlagGain:
        return FlagGain(flags, time.step.total() - self.time.step.total() + seconds, 0.0, words=words)
