"""Time of a training step on a GPU, computed from what a step calculates, moves, exchanges and launches.

Nothing is measured. Matrix products and attention take their FLOPs at the rates of `videox.estimate.rates`; norms,
activation functions, casts and the optimizer take the bytes that they read and write at the rate of the GPU's memory.
These follow each other on one stream, so that their times are added. Copies to the host and between GPUs run beside
them: what is longer than the work that hides it is added. A GPU whose work is shorter than the time in which the host
launches its kernels waits for the host.

The work of the few layers outside of the blocks that is not a matrix product is not counted; nor are waits for data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from videox.estimate.flops import Block, Network
from videox.estimate.gpus import Gpu
from videox.estimate.memory import MemorySetup, Parameters, frozen_bytes, streamed_trained
from videox.estimate.rates import Rates
from videox.models.base_precision import BF16, NF4, quantised_bytes
from videox.models.recompute import ON_DEVICE
from videox.optim.registry import REPLICATED, kind_of, moments_of

# Kernels of a block's forward pass, traced in diffusers' eager blocks of both families; the backward pass has twice as
# many. The host queues them one by one. The time of one is a rough figure for a server's processor, until it is
# measured beside a GPU.
LAUNCHES_PER_BLOCK, SECONDS_PER_LAUNCH = 82, 7e-6
# Of a compiled block: its matrix products, two attentions, and one kernel for the operators between two of them.
COMPILED_LAUNCHES = 30
SCORES_AGAIN = 2.5 / 2  # a fused attention's backward pass computes the scores again: 5 products of a forward pass's 2


class Parts(NamedTuple):
    """Seconds of one GPU, by what takes them.

    Attributes:
        attention: products of queries, keys and values.
        matmul: all other matrix products.
        memory: all other operators, which are limited by the GPU's memory.
        communication: what the exchange between GPUs takes longer than the work beside it.
        host: what copies to and from host memory take longer than the work beside them.
        launches: what the GPU waits for the host.
        waiting: what it waits for other GPUs, which have more work.
        assumed: the model's FLOPs at the MFU of --assumed_mfu, in place of the first three.
    """

    attention: float = 0.0
    matmul: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    host: float = 0.0
    launches: float = 0.0
    waiting: float = 0.0
    assumed: float = 0.0

    def total(self) -> float:
        """Return the seconds of all parts."""
        return sum(self)

    def plus(self, other: Parts, factor: float = 1.0) -> Parts:
        """Return the sum with `factor` times other parts."""
        return Parts(*(mine + factor * its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True)
class StepModel:
    """Computes the time of a micro-batch and of an optimizer step.

    Attributes:
        network: FLOPs and bytes of the transformer.
        parameters: their numbers.
        setup: backend, optimizer and the like.
        rates: of the GPU.
        compiled: the blocks are compiled (--compile).
        assumed_mfu: share of the peak that the model's own FLOPs reach, in place of the computed work; None: computed.
    """

    network: Network
    parameters: Parameters
    setup: MemorySetup
    rates: Rates
    compiled: bool = False
    assumed_mfu: float | None = None

    def micro_batch(self, samples: int, tokens: int, recomputed: Collection[int], keep: str = "") -> Parts:
        """Return the time of a micro-batch's forward and backward pass, with the exchange that belongs to it.

        Args:
            samples: of the micro-batch.
            tokens: of each of them.
            recomputed: numbers of the blocks under activation checkpointing.
            keep: what these keep (--gradient_checkpointing_keep).
        """
        if self.assumed_mfu is not None:
            flops = samples * self.network.forward_backward(tokens)
            work = Parts(assumed=flops / (self.rates.peak * self.assumed_mfu))
        else:
            work = self.forward(samples, tokens).plus(self.recomputation(samples, tokens, recomputed, keep))
            work = work.plus(self.backward(samples, tokens))
        seconds = work.total()
        exchange = exchanged_bytes(self.parameters, self.setup) / self._between_gpus()
        return work._replace(
            communication=max(exchange - seconds, 0.0),
            host=self._offload(samples, tokens, recomputed, keep) + self._streaming(samples, tokens, recomputed, keep),
            launches=max(self.launch_seconds(len(recomputed)) - seconds, 0.0),
        )

    def forward(self, samples: int, tokens: int) -> Parts:
        """Return the work of a micro-batch's forward pass."""
        blocks = self.network.blocks
        work = self._pass([*blocks], samples, tokens)
        outside = samples * self.network.outside(tokens) / self.rates.matmul
        moved = self._casts(self.parameters.total) + _dequantised_bytes(self.parameters, self.setup)
        return work.plus(Parts(matmul=outside, memory=moved / self.rates.memory))

    def recomputation(self, samples: int, tokens: int, recomputed: Collection[int], keep: str = "") -> Parts:
        """Return the work of the forward passes that a backward pass repeats."""
        blocks = [self.network.blocks[number] for number in recomputed]
        if not blocks:
            return Parts()
        work = self._pass(blocks, samples, tokens)
        kept = samples * sum(block.kept_flops(keep)(tokens) for block in blocks) / self.rates.attention
        in_blocks = (self.parameters.total - self.parameters.outside) * len(blocks) / len(self.network.blocks)
        moved = self._casts(in_blocks)
        moved += _dequantised_bytes(self.parameters, self.setup) * len(blocks) / len(self.network.blocks)
        return work.plus(Parts(attention=-kept, memory=moved / self.rates.memory))

    def backward(self, samples: int, tokens: int) -> Parts:
        """Return the work of a micro-batch's backward pass, without recomputation."""
        network, rates = self.network, self.rates
        attention = 2 * sum(block.attention(tokens) for block in network.blocks)
        products = network.forward_backward(tokens) - network.forward(tokens) - attention
        moved = samples * sum(self._traffic(block, tokens)[1] for block in network.blocks)
        moved += _dequantised_bytes(self.parameters, self.setup)
        weights = kind_of(self.setup.optimizer).weight_bytes * self.parameters.trainable
        if self._casts(1):
            moved += 1.5 * weights  # bfloat16 gradients are read, float32 ones are written
        if self.setup.accumulation > 1:
            moved += 3 * weights  # are added to those of the micro-batches before
        return Parts(
            samples * SCORES_AGAIN * attention / rates.attention_backward,
            samples * products / rates.matmul,
            moved / rates.memory,
        )

    def optimizer_step(self, backward: float) -> Parts:
        """Return what an optimizer step adds to its micro-batches.

        Args:
            backward: seconds of a micro-batch's backward pass, beside which DDP's exchange runs.
        """
        setup, parameters = self.setup, self.parameters
        memory = optimizer_bytes(parameters, setup) / self.rates.memory
        link, others = self._between_gpus(), (setup.processes - 1) / setup.processes
        communication = 0.0
        if setup.backend == "ddp":  # an all-reduce of the gradients
            size = kind_of(setup.optimizer).weight_bytes * parameters.trainable
            communication = max(2 * others * size / link - backward, 0.0)
        elif setup.backend == "zero2":  # an all-gather of the new weights
            communication = others * self._element * parameters.trainable / link
        return Parts(
            memory=memory, communication=communication, host=offload_seconds(parameters, setup, self.rates.gpu)
        )

    def launch_seconds(self, recomputed: int) -> float:
        """Return the time of launching the kernels of a micro-batch's forward and backward pass.

        Args:
            recomputed: number of blocks that run forward twice.
        """
        kernels = COMPILED_LAUNCHES if self.compiled else LAUNCHES_PER_BLOCK
        return (3 * len(self.network.blocks) + recomputed) * kernels * SECONDS_PER_LAUNCH

    @property
    def _element(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.setup.half else 4

    def _between_gpus(self) -> float:
        return self.rates.between(machines=-(-self.setup.processes // max(self.setup.per_host, 1)))

    def _pass(self, blocks: Collection[Block], samples: int, tokens: int) -> Parts:
        """Return the work of a forward pass of some blocks, without casts of weights."""
        flops, attention = (
            sum(part(tokens) for part in parts)
            for parts in zip(*((b.forward, b.attention) for b in blocks), strict=True)
        )
        moved = sum(self._traffic(block, tokens)[0] for block in blocks)
        rates = self.rates
        return Parts(
            samples * attention / rates.attention,
            samples * (flops - attention) / rates.matmul,
            samples * moved / rates.memory,
        )

    def _traffic(self, block: Block, tokens: int) -> tuple[float, float]:
        """Return the bytes of a block's small operators in the forward and in the backward pass, for one sample."""
        traffic = block.traffic
        forward, backward = traffic.fused if self.compiled else traffic.eager
        found = forward(tokens), backward(tokens)
        if self.setup.lora:
            more = traffic.fused_adapters if self.compiled else traffic.adapters
            found = found[0] + more[0](tokens), found[1] + more[1](tokens)
        return found

    def _casts(self, weights: float) -> float:
        """Return the bytes of casting so many weights: 4 are read and 2 written where they are float32."""
        setup = self.setup
        if not setup.half or setup.backend not in REPLICATED:
            return 0.0
        trainable = self.parameters.trainable / self.parameters.total
        share = trainable * (kind_of(setup.optimizer).weight_bytes == 4) + (1 - trainable) * (setup.frozen_bytes == 4)
        return 6 * share * weights

    def _offload(self, samples: int, tokens: int, recomputed: Collection[int], keep: str) -> float:
        """Return by how much copies of block inputs (--offload_activations) outlast the blocks beside them."""
        if not self.setup.offload_activations or not recomputed:
            return 0.0
        copies = [samples * size / self.rates.host for size in self.network.offloaded_bytes(tokens, recomputed)]
        count = len(self.network.blocks)
        forward = self.forward(samples, tokens).total() / count
        again = self.recomputation(samples, tokens, recomputed, keep).total() / len(recomputed)
        backward = again + self.backward(samples, tokens).total() / count
        return sum(max(copy - forward, 0.0) + max(copy - backward, 0.0) for copy in copies)

    def _streaming(self, samples: int, tokens: int, recomputed: Collection[int], keep: str) -> float:
        """Return by how much copies of streamed weights (--stream_blocks) outlast the blocks beside them."""
        streamed = self.setup.streamed
        if not streamed:
            return 0.0
        forward, copy = (
            self.forward(samples, tokens).total(),
            streamed_bytes(self.parameters, self.setup) / self.rates.host,
        )
        backward = self.recomputation(samples, tokens, recomputed, keep).plus(self.backward(samples, tokens)).total()
        out = gradient_bytes(self.parameters, self.setup) / self.rates.host  # in the other direction, at the same time
        # those of a step's earlier micro-batches come back when they are needed, beside nothing
        waits = out * (self.setup.accumulation - 1) / self.setup.accumulation
        return max(copy - forward, 0.0) + max(copy - backward, out - backward, 0.0) + waits


def streamed_bytes(parameters: Parameters, setup: MemorySetup) -> float:
    """Return the bytes of streamed weights that are copied to the GPU in one pass; two blocks are there already."""
    count = setup.streamed
    trained = kind_of(setup.optimizer).weight_bytes * streamed_trained(parameters, setup).resting
    resting = frozen_bytes(parameters, setup).resting + trained
    return resting * max(count - ON_DEVICE, 0) / count if count else 0.0


def gradient_bytes(parameters: Parameters, setup: MemorySetup) -> float:
    """Return the bytes of the gradients of streamed blocks, which a backward pass moves to host memory."""
    return float(kind_of(setup.optimizer).weight_bytes * streamed_trained(parameters, setup).resting)


def _dequantised_bytes(parameters: Parameters, setup: MemorySetup) -> float:
    """Return what a GPU reads and writes to dequantise the frozen weights of all blocks once."""
    if setup.base_precision == BF16:
        return 0.0
    read = sum(quantised_bytes(setup.base_precision, block.linear, block.rows) for block in parameters.blocks)
    # 8-bit values are cast and then multiplied: written, read and written again
    written = 2 if setup.base_precision == NF4 else 6
    return read + written * sum(block.linear for block in parameters.blocks)


def exchanged_bytes(parameters: Parameters, setup: MemorySetup) -> float:
    """Return the bytes that a GPU receives for each micro-batch, by rings over all GPUs.

    ZeRO-2 reduces the gradients. ZeRO-3 and FSDP gather the weights for the forward and for the backward pass, and
    reduce the gradients, FSDP in float32. DDP exchanges once per step; see StepModel.optimizer_step.
    """
    others, size = (setup.processes - 1) / setup.processes, 2 if setup.half else 4
    if setup.backend == "zero2":
        return others * size * parameters.trainable
    if setup.backend in REPLICATED:
        return 0.0
    gradient = 4 if setup.backend.startswith("fsdp") else size
    return others * (2 * size * parameters.total + gradient * parameters.trainable)


def optimizer_bytes(parameters: Parameters, setup: MemorySetup) -> float:
    """Return the bytes that clipping, the optimizer and the EMA read and write on a GPU in one step.

    The norm reads a gradient, the clipping reads and writes it; the step reads weight, gradient and moments, and
    writes weight and moments; the EMA reads the weight and itself, and writes itself. Sharded, a GPU has its own part.
    """
    kind = kind_of(setup.optimizer)
    weight, moments = kind.weight_bytes, kind.moment_bytes
    shard = parameters.trainable / (1 if setup.backend in REPLICATED else setup.processes)
    in_host_memory = kind.on_host or setup.offloads("optimizer")
    sizes = 3.0 * weight + (0.0 if in_host_memory else 3.0 * weight + 2.0 * moments)
    return shard * (sizes + (12.0 if setup.ema_device == "accelerator" else 0.0))


def offload_seconds(parameters: Parameters, setup: MemorySetup, gpu: Gpu) -> float:
    """Return the least time per optimizer step that copies between host and GPU take.

    An optimizer in host memory receives each gradient and returns each weight, except those of streamed blocks, which
    are there. Offloaded bfloat16 weights are copied in for the forward and for the backward pass. The arithmetic on
    the host is not counted.
    """
    share, moved = 1 / setup.processes, 0.0
    if kind_of(setup.optimizer).on_host:
        on_device = parameters.trainable - streamed_trained(parameters, setup).resting
        moved += 2 * kind_of(moments_of(setup.optimizer)).weight_bytes * on_device
    if setup.offloads("optimizer"):
        moved += (4 + 2) * parameters.trainable * share
    if setup.offloads("param"):
        moved += 2 * 2 * parameters.total * share
    return moved / gpu.host_bandwidth
