"""Serves both training loops under DeepSpeed: ZeRO-2 divides optimizer and gradients, ZeRO-3 the weights as well."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from videox.distributed.accelerator import gather_objects
from videox.engine.base import (
    OptimizerOver,
    Update,
    compute_in_bf16,
    hyperparameters,
    restore_hyperparameters,
    write_all,
    write_gathered,
    write_run,
)
from videox.engine.deepspeed_universal import TAG, converted, load_engine, load_frozen, load_universal, saved_by
from videox.engine.train_state import TrainState, checkpoint_bytes
from videox.errors import UserError
from videox.files import SaveError
from videox.models.zero_init import set_masters
from videox.optim.build import set_learning_rate
from videox.optim.ema import Fp32Params
from videox.weights.format import TRANSFORMER, FullWeights, WeightFormat
from videox.weights.safe_pickle import read_archive


class DeepSpeedEngine:
    """See Engine. DeepSpeed's engine accumulates, clips and steps; float32 masters, weights and gradients in bfloat16.

    Args:
        accelerator: of the run, with DeepSpeed resolved.
        transformer: of diffusers, its trained parameters chosen; float32 on the host, or made by zero_creation.create.
        make_optimizer: makes the optimizer over parameters by name.
        stored: the float32 weights by name, where the transformer was divided from its creation.
        max_grad_norm: global gradient norm to clip to, in every step.
        batch_size: samples of a micro-batch, for DeepSpeed's own reports.
        micro_batches: of a step on one process, at most.
        output_dir: of the run, where a checkpoint of another number of processes is converted.
        whole_weights: ZeRO-3's checkpoints too have transformer/, float32, gathered tensor by tensor.
        kept: what checkpoints hold of the model (None = all); what is trained alone they also hold gathered.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        make_optimizer: OptimizerOver,
        *,
        stored: Mapping[str, Tensor] | None = None,
        max_grad_norm: float,
        batch_size: int,
        micro_batches: int,
        output_dir: Path,
        whole_weights: bool = False,
        kept: WeightFormat | None = None,
    ) -> None:
        self.kept = kept or FullWeights()
        self.processes, self.gather = accelerator.num_processes, gather_objects(accelerator)
        self.output_dir = output_dir
        self.is_main, self.network = accelerator.is_main_process, transformer
        self.config = transformer.to_json_string()  # type: ignore[operator]
        plugin = accelerator.state.deepspeed_plugin
        self.divides_weights = plugin.zero_stage == 3
        offload = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer") or {}
        self.moments_on_host = offload.get("device", "none") != "none"
        self.saves_whole = whole_weights or not self.divides_weights or self.kept.trained_alone
        whole = 4 if self.saves_whole else 0  # transformer/ beside DeepSpeed's bfloat16 weights and masters
        frozen = 0 if self.kept.trained_alone else 2 + whole
        self.checkpoint_bytes = checkpoint_bytes(transformer, trained=14 + whole, frozen=frozen)
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
        exact = {} if stored else {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
        self.frozen = stored or (_changed_by_rounding(transformer) if self.is_main else {})
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
        if self.divides_weights:
            set_masters(self.parameters, stored or exact)
        else:
            for name, value in exact.items():
                safe_set_full_fp32_param(self.parameters[name], value.to(accelerator.device, torch.float32))
        self.writer = _Writer()
        self.model.checkpoint_engine = self.writer
        self.model._copy_recovery_script = partial(self.writer.attempt, self.model._copy_recovery_script)

    def set_lr(self, rate: float) -> None:
        """As Engine's."""
        set_learning_rate(self.model.optimizer, rate)

    def update(self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor]) -> Update:
        """As Engine's. DeepSpeed clips to its own limit, and leaves a step whose gradient norm is not finite.

        It looks at that on the host, in its own step.
        """
        del limit
        if empty and bool(loss.isfinite()):  # a rare step, for which the host may wait
            return Update(torch.zeros(()), torch.tensor(False))  # the zeros stay accumulated
        self.model.step()
        norm, applied = self.model.get_global_grad_norm(), self.model.was_step_applied()
        return Update(torch.as_tensor(norm, dtype=torch.float64), torch.tensor(applied))

    def discard(self) -> None:
        """As Engine's. ZeRO-3's next backward pass writes over its buffers; ZeRO-2's add up until they are dropped."""
        optimizer = self.model.optimizer
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
        if not self.divides_weights:
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID

    def save(self, folder: Path, state: TrainState) -> None:
        """As Engine's: DeepSpeed's checkpoint, and where whole weights are saved transformer/ with the masters."""
        parts: list[Callable[[], object]] = [partial(self._save_engine, folder)]
        if self.saves_whole:
            write = partial(self.kept.save, folder, TRANSFORMER, config=self.config)
            parts.append(partial(write_gathered, self.weights(), write, is_main=self.is_main))
        if self.is_main:
            parts.append(partial(write_run, folder, state, self.config))
        write_all(parts)

    def _save_engine(self, folder: Path) -> None:
        self.writer.failure = None
        self.model.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=self.kept.trained_alone
        )
        if self.is_main:
            self.writer.attempt((folder / "latest").write_text, TAG)
        if self.writer.failure is not None:
            raise self.writer.failure

    def load(self, checkpoint: Path) -> None:
        """As Engine's; what another number of processes saved is converted first."""
        for file in sorted((checkpoint / TAG).glob("*.pt")):
            read_archive(file)  # refuses what DeepSpeed should not unpickle
        optimizer = self.model.optimizer
        groups, limit = hyperparameters(optimizer), optimizer.clip_grad
        if saved_by(checkpoint) == self.processes:
            load_engine(self.model, checkpoint, TAG, strict=not self.kept.trained_alone)
        else:
            with converted(checkpoint, TAG, self.output_dir, is_main=self.is_main, gather=self.gather) as folder:
                load_universal(self.model, folder, TAG)
            if not self.kept.trained_alone:
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
            elif not self.kept.trained_alone:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.divides_weights):
                    whole = parameter.detach().to("cpu", torch.float32, copy=True)
                exact = self.frozen[name].float() if self.is_main and name in self.frozen else whole
                yield name, exact if torch.equal(exact.bfloat16().float(), whole) else whole
        if self.kept.trained_alone:
            return
        parameters = self.parameters.keys()
        yield from ((name, value) for name, value in self.network.state_dict().items() if name not in parameters)

    def fp32_params(self) -> Fp32Params:
        """As Engine's. Refuses masters on NVMe, which have no place in memory to exchange them with."""
        optimizer = self.model.optimizer
        parameters: Mapping[str, Any] = self.parameters  # DeepSpeed adds to them
        names = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
        if not self.divides_weights:
            empty = torch.empty(0)

            def read(name: str) -> Tensor:
                mapping = parameters[name]._hp_mapping  # None where no part of it is this process's
                return empty if mapping is None else mapping.hp_fragment

            return Fp32Params(
                names,
                read,
                lambda name, values: read(name).copy_(values),
                publish=optimizer.update_lp_params,
                divided=True,
            )
        if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
            what = "keeps the weights on NVMe, where they cannot change places with their EMA"
            raise UserError("--use_ema", f"the DeepSpeed file {what}", "offload to cpu, or drop the flag")

        def write(name: str, values: Tensor) -> None:
            safe_set_local_fp32_param(parameters[name], values)
            parameters[name].ds_tensor.data.copy_(values)

        return Fp32Params(
            names,
            lambda name: safe_get_local_fp32_param(parameters[name]),
            write,
            settle=self.model.empty_partition_cache,
            publish=partial(_gather_persistent, optimizer),
            divided=True,
        )


def _gather_persistent(optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed's, of stage 3
    """Gathers the small weights that ZeRO-3 keeps whole between steps, and drops its copies within a node."""
    deepspeed.get_accelerator().synchronize()  # other weights are gathered on a stream of their own
    optimizer.invalidate_secondary_tensor()
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _changed_by_rounding(module: nn.Module) -> dict[str, Tensor]:
    """Returns the frozen float32 parameters that bfloat16 cannot hold, by name."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in frozen.items() if not torch.equal(value.bfloat16().float(), value)}


class _Writer(TorchCheckpointEngine):
    """Writes DeepSpeed's files and keeps a failure for later: DeepSpeed's save has barriers that a process which left
    by an exception would never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: SaveError | None = None

    def attempt(self, write: Callable[..., object], *arguments: object, **settings: object) -> None:
        """Writes something; torch reports a full disk as RuntimeError."""
        try:
            write(*arguments, **settings)
        except (OSError, RuntimeError) as error:
            self.failure = self.failure or SaveError(f"{type(error).__name__}: {error}")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a folder."""
        self.attempt(os.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes one file in torch's zip format."""
        self.attempt(torch.save, state_dict, path)
