"""DeepSpeedEngine: ZeRO-2 shards optimizer state and gradients across ranks, ZeRO-3 the weights as well."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from videox.distributed.collectives import gather_objects
from videox.engine.base import (
    NO_BOUNDS,
    Bounds,
    OptimizerFactory,
    Update,
    compute_in_bf16,
    hyperparameters,
    restore_hyperparameters,
    run_all_writes,
    write_gathered,
    write_state_and_config,
)
from videox.engine.deepspeed_universal import (
    TAG,
    converted_checkpoint,
    load_engine,
    load_frozen,
    load_universal,
    saved_world_size,
)
from videox.engine.saved_state import WEIGHT, SavedTensor, weight_tensors
from videox.engine.train_state import TrainState, checkpoint_bytes
from videox.errors import SaveError, UserError
from videox.models.zero_init import set_fp32_params
from videox.optim.build import set_learning_rate
from videox.optim.ema import Fp32Params
from videox.weights.format import TRANSFORMER, FullWeights, WeightFormat
from videox.weights.safe_pickle import read_archive


@dataclass(frozen=True)
class DeepSpeedSettings:
    """Values of the flags that DeepSpeed's configuration needs before its engine is made.

    Attributes:
        max_grad_norm: global gradient norm to clip to, in every step.
        batch_size: samples of a micro-batch; only DeepSpeed's own reports use it.
        micro_batches: largest number of micro-batches of a step on one rank.
    """

    max_grad_norm: float
    batch_size: int
    micro_batches: int


class DeepSpeedEngine:
    """Engine on DeepSpeed's engine, which accumulates, clips and steps; fp32 masters, bfloat16 weights and gradients.

    Args:
        accelerator: of the run, with DeepSpeed resolved.
        transformer: of diffusers, with its trainable parameters chosen; float32 on the host, or made by
            zero_init.build_sharded.
        make_optimizer: makes the optimizer from parameters by name.
        stored: the float32 weights by name, if the transformer was sharded from its creation.
        settings: values of the flags.
        output_dir: of the run, where a checkpoint of another world size is converted.
        save_full_weights: ZeRO-3's checkpoints have transformer/, too, float32, gathered tensor by tensor.
        weight_format: what checkpoints contain of the model (None = all). A format of trainable parameters only is
            also saved gathered.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        stored: Mapping[str, Tensor] | None = None,
        settings: DeepSpeedSettings,
        output_dir: Path,
        save_full_weights: bool = False,
        weight_format: WeightFormat | None = None,
    ) -> None:
        self.weight_format = weight_format or FullWeights()
        self.world_size, self.gather = accelerator.num_processes, gather_objects(accelerator)
        self.output_dir = output_dir
        self.is_main, self.network = accelerator.is_main_process, transformer
        self.config = transformer.to_json_string()  # type: ignore[operator]
        plugin = accelerator.state.deepspeed_plugin
        self.shards_weights = plugin.zero_stage == 3
        offload = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer") or {}
        self.moments_on_host = offload.get("device", "none") != "none"
        self.saves_full_weights = save_full_weights or not self.shards_weights or self.weight_format.trainable_only
        # Bytes per parameter: bfloat16 weight (2), fp32 master (4), two moments (8), and transformer/ (4).
        full = 4 if self.saves_full_weights else 0
        frozen = 0 if self.weight_format.trainable_only else 2 + full
        self.checkpoint_bytes = checkpoint_bytes(transformer, trained=14 + full, frozen=frozen)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        plugin.deepspeed_config |= {
            "gradient_clipping": settings.max_grad_norm,
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.micro_batches,
            "train_batch_size": "auto",
        }
        accelerator.gradient_accumulation_steps = settings.micro_batches
        # DeepSpeed rounds the weights to bfloat16 before it copies its masters from them. `exact` keeps the loaded
        # values, which are pages of the mapped file, to set the masters below. `frozen` keeps the frozen ones that
        # rounding changes, for the export.
        exact = {} if stored else {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
        self.frozen = stored or (_changed_by_rounding(transformer) if self.is_main else {})
        if accelerator.mixed_precision == "bf16":
            plugin.deepspeed_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
            # By default DeepSpeed does not check bfloat16 gradients, and would step with ones that are not finite.
            plugin.deepspeed_config["bf16"]["check_grad_overflow"] = True
            compute_in_bf16(transformer, accelerator.device)
        optimizer = make_optimizer(dict(transformer.named_parameters()))
        if accelerator.device.type == "cuda" and isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:  # made for parameters on the host, but stepped on the GPU
                group["fused"] = True
        self.model: Any = accelerator.prepare(transformer.train(), optimizer)[0]
        self.parameters = dict(transformer.named_parameters())
        if self.shards_weights:
            set_fp32_params(self.parameters, stored or exact)
        else:
            for name, value in exact.items():
                safe_set_full_fp32_param(self.parameters[name], value.to(accelerator.device, torch.float32))
        self.norms = _BoundedNorms(self.model.optimizer, sharded=self.shards_weights)
        self.writer = _DeferredErrorWriter()
        self.model.checkpoint_engine = self.writer
        self.model._copy_recovery_script = partial(self.writer.attempt, self.model._copy_recovery_script)

    def set_lr(self, lr: float) -> None:
        """See Engine.set_lr."""
        set_learning_rate(self.model.optimizer, lr)

    def update(
        self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor], bounds: Bounds = NO_BOUNDS
    ) -> Update:
        """See Engine.update. DeepSpeed clips to its own limit, and skips a step whose gradient norm is not finite.

        It checks the norm on the host, inside its own step.
        """
        del limit
        if empty and bool(loss.isfinite()):  # rare, so that the host may wait for the loss
            return Update(torch.zeros(()), torch.tensor(False))  # its zero gradients may stay accumulated
        # A step is left out by its norm alone: a loss above its bound lets no norm pass.
        spike = bounds.loss < math.inf and bool(loss > bounds.loss)
        self.norms.largest, self.norms.refused = -1.0 if spike else bounds.grad_norm, None
        self.model.step()
        norm, applied = self.model.get_global_grad_norm(), self.model.was_step_applied()
        norm = norm if applied or self.norms.refused is None else self.norms.refused
        return Update(torch.as_tensor(norm, dtype=torch.float64), torch.tensor(applied))

    def zero_grad(self) -> None:
        """See Engine.zero_grad.

        ZeRO-3's next backward pass overwrites its gradient buffers; ZeRO-2 accumulates into them until they are
        dropped.
        """
        optimizer = self.model.optimizer
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
        if not self.shards_weights:
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID

    def saved_tensors(self) -> Iterator[SavedTensor]:
        """See Engine.saved_tensors: this rank's part of the masters and moments, and its bfloat16 weights.

        What DeepSpeed offloads to NVMe is not read.
        """
        yield from weight_tensors(self._held_weights())
        if self.shards_weights and self.model.optimizer.swap_optimizer:
            return
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                for kind, values in _states(self.model.optimizer, parameter, sharded=self.shards_weights):
                    yield SavedTensor(kind, name, values)

    def _held_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that this rank computes with: its shards, or on the main rank all of them."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad or not self.weight_format.trainable_only:
                if self.shards_weights and hasattr(parameter, "ds_tensor"):
                    yield name, parameter.ds_tensor.data
                elif not self.shards_weights and self.is_main:
                    yield name, parameter

    def replicated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.replicated_weights: under ZeRO-2 the weights in bfloat16, gathered from the sharded masters."""
        parameters = {} if self.shards_weights else self.parameters
        return ((name, parameter.detach()) for name, parameter in parameters.items())

    def save(self, folder: Path, state: TrainState) -> None:
        """See Engine.save: DeepSpeed's checkpoint, and transformer/ from fp32 masters if full weights are saved."""
        writes: list[Callable[[], object]] = [partial(self._save_engine, folder)]
        if self.saves_full_weights:
            write = partial(self.weight_format.save, folder, TRANSFORMER, config=self.config)
            writes.append(partial(write_gathered, self.weights(), write, is_main=self.is_main))
        if self.is_main:
            writes.append(partial(write_state_and_config, folder, state, self.config))
        run_all_writes(writes)

    def _save_engine(self, folder: Path) -> None:
        self.writer.failure = None
        self.model.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=self.weight_format.trainable_only
        )
        if self.is_main:
            self.writer.attempt((folder / "latest").write_text, TAG)
        if self.writer.failure is not None:
            raise self.writer.failure

    def load(self, checkpoint: Path) -> None:
        """See Engine.load; a checkpoint of another world size is converted first."""
        for file in sorted((checkpoint / TAG).glob("*.pt")):
            read_archive(file)  # raises UserError for pickled objects that DeepSpeed should not load
        optimizer = self.model.optimizer
        groups, limit = hyperparameters(optimizer), optimizer.clip_grad
        if saved_world_size(checkpoint) == self.world_size:
            load_engine(self.model, checkpoint, TAG, strict=not self.weight_format.trainable_only)
        else:
            with converted_checkpoint(
                checkpoint, TAG, self.output_dir, is_main=self.is_main, gather=self.gather
            ) as folder:
                load_universal(self.model, folder, TAG)
            if not self.weight_format.trainable_only:
                load_frozen(checkpoint / TAG, self.parameters | dict(self.network.named_buffers()), self._writable)
        restore_hyperparameters(optimizer, groups)
        optimizer.clip_grad = limit  # ZeRO-2 has overwritten it with the checkpoint's

    @contextmanager
    def _writable(self, tensor: Tensor) -> Iterator[bool]:
        """Gather a tensor on all ranks; the yielded flag is whether this rank must write it.

        If the tensor is sharded, only the main rank writes, and all ranks get its value on exit.
        """
        sharded = self.shards_weights and hasattr(tensor, "ds_id")  # buffers are not sharded
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=sharded):
            yield self.is_main or not sharded

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.weights: one full tensor at a time."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif not self.weight_format.trainable_only:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.shards_weights):
                    rounded = parameter.detach().to("cpu", torch.float32, copy=True)
                exact = self.frozen[name].float() if self.is_main and name in self.frozen else rounded
                # Exact only if it is what the model computes with: a loaded checkpoint may have other frozen weights.
                yield name, exact if torch.equal(exact.bfloat16().float(), rounded) else rounded
        if self.weight_format.trainable_only:
            return
        parameters = self.parameters.keys()
        yield from ((name, value) for name, value in self.network.state_dict().items() if name not in parameters)

    def fp32_params(self) -> Fp32Params:
        """See Engine.fp32_params. Raises UserError if the masters are on NVMe: there they cannot be swapped."""
        optimizer = self.model.optimizer
        parameters: Mapping[str, Any] = self.parameters  # Any: DeepSpeed adds attributes to them
        names = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
        if not self.shards_weights:
            empty = torch.empty(0)

            def read(name: str) -> Tensor:
                mapping = parameters[name]._hp_mapping  # None if this rank has no part of the parameter
                return empty if mapping is None else mapping.hp_fragment

            return Fp32Params(
                names,
                read,
                lambda name, values: read(name).copy_(values),
                after_swap=optimizer.update_lp_params,
                sharded=True,
            )
        if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
            what = "keeps the weights on NVMe, where they cannot be swapped with their EMA"
            raise UserError("--use_ema", f"the DeepSpeed file {what}", "offload to cpu, or remove the flag")

        def write(name: str, values: Tensor) -> None:
            safe_set_local_fp32_param(parameters[name], values)
            parameters[name].ds_tensor.data.copy_(values)

        return Fp32Params(
            names,
            lambda name: safe_get_local_fp32_param(parameters[name]),
            write,
            before_swap=self.model.empty_partition_cache,
            after_swap=partial(_gather_persistent, optimizer),
            sharded=True,
        )


def _states(optimizer: Any, parameter: Any, *, sharded: bool) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401 - DeepSpeed's
    """Yield this rank's part of a parameter's float32 weight and moments, each with its kind.

    Args:
        optimizer: of ZeRO-2 or ZeRO-3, which have them in one flat tensor for each group of parameters.
        parameter: a trainable one.
        sharded: it is of ZeRO-3.
    """
    if sharded:
        group, begin, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
    elif parameter._hp_mapping is None:  # this rank has no part of the parameter
        return
    else:
        address = parameter._hp_mapping.hp_fragment_address
        flat = optimizer.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]
        begin, count = address.start, address.numel
    yield WEIGHT, flat.detach().narrow(0, begin, count)
    for key, value in optimizer.optimizer.state.get(flat, {}).items():
        if isinstance(value, Tensor) and value.shape == flat.shape:  # not the count of steps
            yield key, value.narrow(0, begin, count)


class _BoundedNorms:
    """Has DeepSpeed's optimizer treat a gradient norm above a bound as it treats one that is not finite.

    Attributes:
        largest: the bound; infinity = none.
        refused: the norm of a step that was left out for it; to be reset to None before each step.
    """

    def __init__(self, optimizer: Any, *, sharded: bool) -> None:  # noqa: ANN401 - of either stage
        self.largest = math.inf
        self.refused: float | None = None
        self._norm = combine_grad_norm_groups if sharded else lambda norm: norm
        # The methods that return the norm, all-reduced, before DeepSpeed decides whether to step.
        name = "_get_norm_groups" if sharded else "scaled_global_norm"
        self._compute, self._scale = getattr(optimizer, name), lambda: optimizer.loss_scale
        self._infinite: Callable[[], Any] = (lambda: [math.inf]) if sharded else lambda: math.inf
        setattr(optimizer, name, self._bounded)

    def _bounded(self, *arguments: Any, **settings: Any) -> Any:  # noqa: ANN401 - DeepSpeed's own
        computed = self._compute(*arguments, **settings)
        if self.largest == math.inf:
            return computed
        norm = float(self._norm(computed)) / self._scale()
        if norm <= self.largest or not math.isfinite(norm):
            return computed
        self.refused = norm
        return self._infinite()


def _gather_persistent(optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed's, of stage 3
    """Gather the small weights that ZeRO-3 keeps unsharded between steps, and drop its copies within a node."""
    deepspeed.get_accelerator().synchronize()  # DeepSpeed gathers other weights on a separate stream
    optimizer.invalidate_secondary_tensor()
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _changed_by_rounding(module: nn.Module) -> dict[str, Tensor]:
    """Return the frozen float32 parameters that bfloat16 cannot represent exactly, by name."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in frozen.items() if not torch.equal(value.bfloat16().float(), value)}


class _DeferredErrorWriter(TorchCheckpointEngine):
    """Writes DeepSpeed's files and stores the first failure for later.

    DeepSpeed's save has barriers, which a rank that left it by an exception would never reach.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: SaveError | None = None

    def attempt(self, write: Callable[..., object], *arguments: object, **settings: object) -> None:
        """Call a function that writes, and store its failure. torch reports a full disk as RuntimeError."""
        try:
            write(*arguments, **settings)
        except (OSError, RuntimeError) as error:
            self.failure = self.failure or SaveError(f"{type(error).__name__}: {error}")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder."""
        self.attempt(os.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file in torch's zip format."""
        self.attempt(torch.save, state_dict, path)
