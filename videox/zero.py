"""Serves both training loops under DeepSpeed: ZeRO-2 divides optimizer and gradients, ZeRO-3 the weights as well."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from videox.engine import (
    OptimizerOver,
    Update,
    compute_in_bf16,
    hyperparameters,
    restore_hyperparameters,
    write_all,
    write_gathered,
    write_run,
)
from videox.errors import MODEL, Refusal
from videox.optim import set_learning_rate
from videox.pickles import read_archive
from videox.state import TrainState, checkpoint_bytes
from videox.weights import SaveFailed, save_weights

TAG = "pytorch_model"  # accelerate's; DeepSpeed's own scripts find it through the file `latest`


class ZeroEngine:
    """See Engine. DeepSpeed's engine accumulates, clips and steps; float32 masters, weights and gradients in bfloat16.

    Args:
        accelerator: of the run, with DeepSpeed resolved.
        transformer: of diffusers, float32, its trained parameters chosen; on the host.
        make_optimizer: makes the optimizer over parameters by name.
        max_grad_norm: global gradient norm to clip to, in every step.
        batch_size: samples of a micro-batch, for DeepSpeed's own reports.
        micro_batches: of a step on one process, at most.
        whole_weights: ZeRO-3's checkpoints too have transformer/, float32, gathered tensor by tensor.
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
        whole_weights: bool = False,
    ) -> None:
        self.is_main, self.network = accelerator.is_main_process, transformer
        self.config = transformer.to_json_string()  # type: ignore[operator]
        plugin = accelerator.state.deepspeed_plugin
        self.divides_weights = plugin.zero_stage == 3
        self.saves_whole = whole_weights or not self.divides_weights
        whole = 4 if self.saves_whole else 0  # transformer/ beside DeepSpeed's bfloat16 weights and masters
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
            safe_set_full_fp32_param(self.parameters[name], value.to(accelerator.device, torch.float32))
        self.writer = _Writer()
        self.model.checkpoint_engine = self.writer
        self.model._copy_recovery_script = partial(self.writer.attempt, self.model._copy_recovery_script)

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
        """As Engine's: DeepSpeed's checkpoint, and where whole weights are saved transformer/ with the masters."""
        parts: list[Callable[[], object]] = [partial(self._save_engine, folder)]
        if self.saves_whole:
            write = partial(save_weights, folder / "transformer", config=self.config)
            parts.append(partial(write_gathered, self.weights(), write, is_main=self.is_main))
        if self.is_main:
            parts.append(partial(write_run, folder, state, self.config))
        write_all(parts)

    def _save_engine(self, folder: Path) -> None:
        self.writer.failure = None
        self.model.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.is_main:
            self.writer.attempt((folder / "latest").write_text, TAG)
        if self.writer.failure is not None:
            raise self.writer.failure

    def load(self, checkpoint: Path) -> None:
        """As Engine's; at the number of processes that saved it."""
        for file in sorted((checkpoint / TAG).glob("*.pt")):
            read_archive(file)  # refuses what DeepSpeed should not unpickle
        groups = hyperparameters(self.model.optimizer)
        path, _ = self.model.load_checkpoint(str(checkpoint), tag=TAG)
        if path is None:
            raise Refusal(str(checkpoint), "DeepSpeed cannot load it", "resume from another checkpoint", MODEL)
        restore_hyperparameters(self.model.optimizer, groups)

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


def _changed_by_rounding(module: nn.Module) -> dict[str, Tensor]:
    """Returns the frozen float32 parameters that bfloat16 cannot hold, by name."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in frozen.items() if not torch.equal(value.bfloat16().float(), value)}


class _Writer(TorchCheckpointEngine):
    """Writes DeepSpeed's files and keeps a failure for later: DeepSpeed's save has barriers that a process which left
    by an exception would never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: SaveFailed | None = None

    def attempt(self, write: Callable[..., object], *arguments: object, **settings: object) -> None:
        """Writes something; torch reports a full disk as RuntimeError."""
        try:
            write(*arguments, **settings)
        except (OSError, RuntimeError) as error:
            self.failure = self.failure or SaveFailed(f"{type(error).__name__}: {error}")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a folder."""
        self.attempt(os.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes one file in torch's zip format."""
        self.attempt(torch.save, state_dict, path)
