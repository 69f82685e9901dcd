"""StreamedEngine: full fine-tuning in one process with blocks whose weights and gradients are in host memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from videox.engine.base import NO_BOUNDS, Bounds, OptimizerFactory, Update, may_step
from videox.engine.ddp import DdpEngine
from videox.models.trained_stream import TrainedStream
from videox.optim.build import clip_gradients, step_if
from videox.optim.cpu_offload import CpuOffloadOptimizer
from videox.optim.ema import Fp32Params


class StreamedEngine(DdpEngine):
    """DdpEngine of a single process, with streamed blocks that are trained.

    Checkpoints are those of a DdpEngine with the same optimizer, and each engine can load those of the other.

    Args:
        accelerator: of the run, with one process.
        transformer: as DdpEngine's.
        make_optimizer: makes a CpuOffloadOptimizer, which steps the streamed parameters where they are.
        stream: of its blocks.
    """

    def __init__(
        self, accelerator: Accelerator, transformer: nn.Module, make_optimizer: OptimizerFactory, stream: TrainedStream
    ) -> None:
        super().__init__(accelerator, transformer, make_optimizer)
        assert isinstance(self.optimizer, CpuOffloadOptimizer)
        self._stream, in_host_memory = stream, {*stream.parameters}
        self._on_host = [parameter for parameter in self.trainable if parameter in in_host_memory]
        self._on_device = [parameter for parameter in self.trainable if parameter not in in_host_memory]
        self.optimizer.step_in_place(self._on_host, accelerator.device)

    def update(
        self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor], bounds: Bounds = NO_BOUNDS
    ) -> Update:
        """See Engine.update; the host waits until all gradients are in its memory."""
        norm = self._gradient_norm().to(loss.device)
        applied = may_step(norm, loss, bounds)
        if empty:
            applied = torch.zeros_like(applied)
        else:
            self._stream.gradients.wait()
            clip_gradients(self._on_device, norm, limit(norm))
            on_host = norm.cpu()
            clip_gradients(self._on_host, on_host, limit(on_host))
            step_if(self.optimizer, applied)
            self._stream.weights.forget()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def _gradient_norm(self) -> Tensor:
        """Return the global 2-norm of all gradients; that of a streamed one was computed before it left the device."""
        norms = self._stream.gradients.norms
        values = [norms.get(parameter, parameter.grad) for parameter in self.trainable if parameter.grad is not None]
        return torch.nn.utils.get_total_norm([value for value in values if value is not None])

    def load(self, checkpoint: Path) -> None:
        """See Engine.load."""
        super().load(checkpoint)
        self._stream.weights.forget()

    def fp32_params(self) -> Fp32Params:
        """See Engine.fp32_params."""
        return replace(super().fp32_params(), after_swap=self._stream.weights.forget)
