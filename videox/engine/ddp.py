"""DdpEngine: full weights on each rank, for a single process or DDP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from videox.engine.base import NO_BOUNDS, Bounds, OptimizerFactory, Update, may_step
from videox.engine.saved_state import SavedTensor, moment_tensors, weight_tensors
from videox.engine.train_state import TrainState, checkpoint_bytes, load_state, save_state
from videox.optim.build import clip_gradients, gradient_norm, set_learning_rate, step_if
from videox.optim.cpu_offload import CpuOffloadOptimizer
from videox.optim.ema import Fp32Params
from videox.weights.format import FullWeights, WeightFormat


class DdpEngine:
    """Engine with full weights on each rank: a single process, or DDP.

    Args:
        accelerator: of the run.
        transformer: of diffusers, float32, with its trainable parameters chosen.
        make_optimizer: makes the optimizer from parameters by name.
        weight_format: what checkpoints contain of the model (None = all).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        make_optimizer: OptimizerFactory,
        weight_format: WeightFormat | None = None,
    ) -> None:
        self.is_main, self.weight_format = accelerator.is_main_process, weight_format or FullWeights()
        self.world_size = accelerator.num_processes
        self.config = transformer.to_json_string()  # type: ignore[operator]
        self.network = transformer.to(accelerator.device)
        self.optimizer = make_optimizer(dict(transformer.named_parameters()))
        self.moments_on_host = isinstance(self.optimizer, CpuOffloadOptimizer)
        self.trainable = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.model = accelerator.prepare_model(transformer.train())
        if isinstance(self.model, DistributedDataParallel):
            # The models' buffers are constant. DDP would broadcast them before every forward pass, and ranks would
            # wait. accelerate can pass only the argument `broadcast_buffers`, which torch has deprecated.
            self.model.forward_sync_buffers = False
        self.checkpoint_bytes = checkpoint_bytes(transformer, frozen=0 if self.weight_format.trainable_only else 4)

    def set_lr(self, lr: float) -> None:
        """See Engine.set_lr."""
        set_learning_rate(self.optimizer, lr)

    def update(
        self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor], bounds: Bounds = NO_BOUNDS
    ) -> Update:
        """See Engine.update."""
        norm = gradient_norm(self.trainable)
        if self.world_size > 1:
            # Every rank computes the norm of its own copy of the reduced gradients. If only one of them has an
            # infinite value, by a fault of its memory or of the reduction, all ranks must skip the step.
            norm = torch.where(norm.isfinite(), norm, math.inf)
            dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        applied = may_step(norm, loss, bounds)
        if empty:
            applied = torch.zeros_like(applied)
        else:
            clip_gradients(self.trainable, norm, limit(norm))
            step_if(self.optimizer, applied)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def zero_grad(self) -> None:
        """See Engine.zero_grad."""
        self.optimizer.zero_grad(set_to_none=True)

    def saved_tensors(self) -> Iterator[SavedTensor]:
        """See Engine.saved_tensors; nothing on a rank that does not write."""
        if self.is_main:
            yield from weight_tensors(self.weights())
            yield from moment_tensors(self.optimizer, {p: name for name, p in self.network.named_parameters()})

    def replicated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.replicated_weights: all parameters, those of streamed blocks excepted."""
        return ((name, parameter.detach()) for name, parameter in self.network.named_parameters())

    def save(self, folder: Path, state: TrainState) -> None:
        """See Engine.save: transformer/ in diffusers layout, and the optimizer's tensors."""
        if self.is_main:
            save_state(
                folder,
                state=state,
                model=self.network,
                config=self.config,
                optimizer=self.optimizer,
                weight_format=self.weight_format,
            )

    def load(self, checkpoint: Path) -> None:
        """See Engine.load."""
        load_state(checkpoint, self.network, self.optimizer, self.weight_format)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.weights."""
        if self.weight_format.trainable_only:
            yield from ((name, p.detach()) for name, p in self.network.named_parameters() if p.requires_grad)
        else:
            yield from self.network.state_dict().items()

    def fp32_params(self) -> Fp32Params:
        """See Engine.fp32_params: all of the trainable parameters."""
        trainable = {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}
        return Fp32Params(tuple(trainable), trainable.__getitem__, lambda name, values: trainable[name].copy_(values))
