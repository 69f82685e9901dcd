"""Serves both training loops under DeepSpeed: ZeRO-2 divides optimizer and gradients, ZeRO-3 the weights as well."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from videox.checkpoint import SAVE_ERRORS
from videox.distributed import gather_objects
from videox.engine import (
    OptimizerOver,
    Update,
    compute_in_bf16,
    drain,
    hyperparameters,
    restore_hyperparameters,
    write_all,
    write_run,
)
from videox.optim import set_learning_rate
from videox.pickles import read_archive
from videox.state import TrainState, checkpoint_bytes
from videox.weights import save_weights
from videox.zero_universal import TAG, converted, load_engine, load_frozen, load_universal, saved_by


class ZeroEngine:
    """See Engine. DeepSpeed's engine accumulates, clips and steps; float32 masters, weights and gradients in bfloat16.

    Args:
        accelerator: of the run, with DeepSpeed resolved.
        transformer: of diffusers, float32, its trained parameters chosen; on the host.
        make_optimizer: makes the optimizer over parameters by name.
        max_grad_norm: global gradient norm to clip to, in every step.
        batch_size: samples of a micro-batch, for DeepSpeed's own reports.
        micro_batches: of a step on one process, at most.
        output_dir: of the run, where a checkpoint of another number of processes is converted.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        make_optimizer: OptimizerOver,
        *,
        max_grad_norm: float,
        batch_size: int,
        micro_batches: int,
        output_dir: Path,
    ) -> None:
        self.processes, self.gather = accelerator.num_processes, gather_objects(accelerator)
        self.output_dir = output_dir
        self.is_main, self.network = accelerator.is_main_process, transformer
        self.config = transformer.to_json_string()  # type: ignore[operator]
        plugin = accelerator.state.deepspeed_plugin
        self.divides_weights = plugin.zero_stage == 3
        whole = 0 if self.divides_weights else 4  # transformer/ beside DeepSpeed's bfloat16 weights and masters
        self.checkpoint_bytes = checkpoint_bytes(transformer, trained=14 + whole, frozen=2 + whole)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        plugin.deepspeed_config |= {
            "gradient_clipping": max_grad_norm,
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": micro_batches,
            "train_batch_size": "auto",
        }
        accelerator.gradient_accumulation_steps = micro_batches
        # DeepSpeed rounds the weights before it takes its masters from them. These keep what was loaded, which lies in
        # the mapped file; of the frozen ones what rounding changes, for the export.
        exact = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
        self.frozen = _changed_by_rounding(transformer) if self.is_main else {}
        if accelerator.mixed_precision == "bf16":
            plugin.deepspeed_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
            plugin.deepspeed_config["bf16"]["check_grad_overflow"] = True
            compute_in_bf16(transformer, accelerator.device)
        optimizer = make_optimizer(dict(transformer.named_parameters()))
        if accelerator.device.type == "cuda":
            for group in optimizer.param_groups:  # chosen for the host's parameters, stepped on the GPU
                group["fused"] = True
        self.model: Any = accelerator.prepare(transformer.train(), optimizer)[0]
        self.parameters = dict(transformer.named_parameters())
        for name, value in exact.items():
            _set_master(self.parameters[name], value.to(accelerator.device, torch.float32))
        self.writer = _Writer()
        self.model.checkpoint_engine = self.writer

    def set_rate(self, rate: float) -> None:
        """As Engine's."""
        set_learning_rate(self.model.optimizer, rate)

    def update(self, *, loss: float, empty: bool, limit: Callable[[float], float]) -> Update:
        """As Engine's. DeepSpeed clips to its own limit, and leaves a step whose gradient norm is not finite."""
        del limit
        if empty and math.isfinite(loss):
            return Update(0.0, False)  # the zeros stay accumulated
        self.model.step()
        return Update(float(self.model.get_global_grad_norm()), self.model.was_step_applied())

    def save(self, folder: Path, state: TrainState) -> None:
        """As Engine's: DeepSpeed's checkpoint, and under ZeRO-2 transformer/ with the float32 masters."""
        parts: list[Callable[[], object]] = [partial(self._save_engine, folder)]
        if not self.divides_weights:
            weights = self.weights()
            write = partial(save_weights, folder / "transformer", weights, self.config)
            parts.append(write if self.is_main else partial(drain, weights))
        if self.is_main:
            parts.append(partial(write_run, folder, state, self.config))
        write_all(parts)

    def _save_engine(self, folder: Path) -> None:
        self.writer.failure = None
        self.model.save_checkpoint(str(folder), tag=TAG)
        if self.writer.failure is not None:
            raise self.writer.failure

    def load(self, checkpoint: Path) -> None:
        """As Engine's; what another number of processes saved is converted first."""
        for file in sorted((checkpoint / TAG).glob("*.pt")):
            read_archive(file)  # refuses what DeepSpeed should not unpickle
        optimizer = self.model.optimizer
        groups, limit = hyperparameters(optimizer), optimizer.clip_grad
        if saved_by(checkpoint) == self.processes:
            load_engine(self.model, checkpoint, TAG)
        else:
            with converted(checkpoint, TAG, self.output_dir, is_main=self.is_main, gather=self.gather) as folder:
                load_universal(self.model, folder, TAG)
            load_frozen(checkpoint / TAG, self.parameters | dict(self.network.named_buffers()), self._writing)
        restore_hyperparameters(optimizer, groups)
        optimizer.clip_grad = limit  # ZeRO-2 takes the checkpoint's

    @contextmanager
    def _writing(self, tensor: Tensor) -> Iterator[bool]:
        """Makes a tensor whole on all processes; says whether this one is to write it, for the others too."""
        divided = self.divides_weights and hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=divided):
            yield self.is_main or not divided

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """As Engine's: one tensor at a time is whole."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            else:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.divides_weights):
                    whole = parameter.detach().to("cpu", torch.float32, copy=True)
                exact = self.frozen.get(name)
                yield name, exact if exact is not None and torch.equal(exact.bfloat16().float(), whole) else whole
        parameters = self.parameters.keys()
        yield from ((name, value) for name, value in self.network.state_dict().items() if name not in parameters)


def _set_master(parameter: Any, value: Tensor) -> None:  # noqa: ANN401 - with DeepSpeed's attributes
    """Sets the float32 master of a parameter, or this process's equal slice of it, of which the last is padded."""
    if not hasattr(parameter, "ds_tensor"):
        safe_set_full_fp32_param(parameter, value)
        return
    size = parameter.ds_tensor.numel()  # DeepSpeed's own way to set a whole one knows no padding
    own = value.reshape(-1)[parameter.ds_zero_partition_rank * size :][:size]
    safe_set_local_fp32_param(parameter, nn.functional.pad(own, (0, size - own.numel())))


def _changed_by_rounding(module: nn.Module) -> dict[str, Tensor]:
    """Returns the frozen float32 parameters that bfloat16 cannot hold, by name."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in frozen.items() if not torch.equal(value.bfloat16().float(), value)}


class _Writer(TorchCheckpointEngine):
    """Writes DeepSpeed's files and keeps a failure for later: DeepSpeed's save has barriers that a process which left
    by an exception would never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: Exception | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes one file in torch's zip format."""
        try:
            torch.save(state_dict, path)
        except SAVE_ERRORS as error:
            self.failure = self.failure or error
