"""FsdpEngine: FSDP1 and FSDP2, with weights, gradients and optimizer state sharded across ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
)
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from videox.engine.base import (
    NO_BOUNDS,
    Bounds,
    OptimizerFactory,
    Update,
    compute_in_bf16,
    hyperparameters,
    may_step,
    restore_hyperparameters,
    run_all_writes,
    write_gathered,
    write_state_and_config,
)
from videox.engine.fsdp_local_optim import LocalShards
from videox.engine.saved_state import SavedTensor, local_part, moment_tensors, weight_tensors
from videox.engine.train_state import TrainState, checkpoint_bytes
from videox.errors import MODEL, SaveError, UserError
from videox.models.meta_init import fill_shards
from videox.optim.build import set_learning_rate, step_if
from videox.optim.ema import Fp32Params
from videox.weights.format import TRANSFORMER, FullWeights, WeightFormat
from videox.weights.safe_pickle import read_pickle
from videox.weights.safetensors_io import TensorSource

# accelerate's folder names, so that `accelerate merge-weights checkpoint-N/pytorch_model_fsdp_0` works.
WEIGHTS_FOLDER, OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"
METADATA = ".metadata"
SHARDING_STRATEGIES = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)


class FsdpEngine:
    """Engine on torch's FSDP. Each layer class that the launcher names is gathered only for its own computation.

    Gradients are reduced to shards after every micro-batch: unsharded until the step's last one, they would need as
    much device memory as the full weights.

    Args:
        accelerator: of the run, with FSDP resolved.
        transformer: of diffusers, float32, with its trainable parameters chosen; on the host, or made by
            meta_init.build_meta_model.
        blocks: its repeated blocks, whose classes are suggested if the launcher names an unknown layer class.
        make_optimizer: makes the optimizer from parameters by name.
        stored: weights of a transformer on the meta device (FSDP2), of which each rank reads its own shards.
        save_full_weights: checkpoints also have transformer/, float32, gathered tensor by tensor.
        weight_format: what checkpoints contain of the model (None = all). A format of trainable parameters only is
            also saved gathered.
        by_shard: the optimizer is made over each rank's local shards, and saved by rank: it does not support DTensor,
            or its moments may be of any kind.

    Raises:
        UserError: the launcher names a layer class that is not in the model, or an unsupported sharding strategy.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        blocks: Sequence[nn.Module],
        make_optimizer: OptimizerFactory,
        *,
        stored: TensorSource | None = None,
        save_full_weights: bool = False,
        weight_format: WeightFormat | None = None,
        by_shard: bool = False,
    ) -> None:
        self.weight_format = weight_format or FullWeights()
        plugin = accelerator.state.fsdp_plugin
        refuse_unknown_layers(plugin.transformer_cls_names_to_wrap, transformer, blocks)
        self.is_main = accelerator.is_main_process
        self.config = transformer.to_json_string()  # type: ignore[operator]
        self.saves_full_weights = save_full_weights or self.weight_format.trainable_only
        # Bytes per parameter: float32 weight (4), two moments (8), and transformer/ (4).
        full, frozen = 4 if self.saves_full_weights else 0, 0 if self.weight_format.trainable_only else 4
        self.checkpoint_bytes = checkpoint_bytes(transformer, trained=12 + full, frozen=frozen and frozen + full)
        self.options = StateDictOptions(ignore_frozen_params=self.weight_format.trainable_only)
        wrap = _wrap_fsdp2 if plugin.fsdp_version == 2 else _wrap_fsdp1
        self.model = self.network = wrap(accelerator, transformer.train())
        if stored:
            _allocate_shards(self.model, accelerator)
            fill_shards(_local_shards(self.model, stored), stored.folder)
        parameters = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in self.model.named_parameters()}
        self.all_parameters = parameters
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.group = _process_group(self.model, next(iter(self.parameters.values())))
        self.shards: LocalShards | None = None
        if by_shard:
            rank, world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
            self.shards = LocalShards(parameters, rank=rank, world_size=world_size)
        self.optimizer = make_optimizer(self.shards.parameters if self.shards else parameters)
        optimized = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # With local shards the backward pass still leaves its gradients at the DTensors.
        self.trainable = list(self.parameters.values()) if self.shards else optimized
        self.moments_on_host = self.trainable[0].device.type == "cpu"  # fsdp_offload_params

    def set_lr(self, lr: float) -> None:
        """See Engine.set_lr."""
        set_learning_rate(self.optimizer, lr)

    def update(
        self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor], bounds: Bounds = NO_BOUNDS
    ) -> Update:
        """See Engine.update."""
        # The norm of the local shards is combined over ranks here, for both versions of FSDP and without a wait on the
        # host. In float64, since the square of a large but finite float32 norm may overflow.
        gradients = [local_part(parameter.grad) for parameter in self.trainable if parameter.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.trainable[0].device)
        if gradients:
            squares += torch.nn.utils.get_total_norm(gradients).double() ** 2
        dist.all_reduce(squares, group=self.group)
        norm = squares.sqrt()
        applied = may_step(norm, loss, bounds)
        if empty:
            applied = torch.zeros_like(applied)
        else:
            scale = (limit(norm) / (norm + 1e-6)).clamp(max=1.0)
            if gradients:  # a rank may have no piece of the trainable parameters
                torch._foreach_mul_(gradients, scale.float())
            if self.shards:
                self.shards.take_gradients()
            step_if(self.optimizer, applied)
        self.zero_grad()
        return Update(norm, applied)

    def zero_grad(self) -> None:
        """See Engine.zero_grad."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.trainable:  # the optimizer may have other tensors: their local shards
            parameter.grad = None

    def saved_tensors(self) -> Iterator[SavedTensor]:
        """See Engine.saved_tensors: this rank's shards."""
        _restore_parameters(self.model)
        _reshard_all(self.model)
        own = self.all_parameters if not self.weight_format.trainable_only else self.parameters
        yield from weight_tensors(own.items())
        named = self.shards.parameters if self.shards else self.all_parameters
        yield from moment_tensors(self.optimizer, {parameter: name for name, parameter in named.items()})

    def replicated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.replicated_weights: none."""
        return iter(())

    def save(self, folder: Path, state: TrainState) -> None:
        """See Engine.save: torch's distributed checkpoints, each rank writing its shards; transformer/ on request."""
        _restore_parameters(self.model)
        with _quiet():
            if self.shards:
                weights = get_model_state_dict(self.model, options=self.options)
                save_moments = partial(self.shards.save, self.optimizer, folder / OPTIMIZER_FOLDER)
            else:
                weights, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
                save_moments = partial(_save_distributed, _optimizer_tensors(optimizer), folder / OPTIMIZER_FOLDER)
            save_weights = partial(_save_distributed, {"model": weights}, folder / WEIGHTS_FOLDER)
            writes: list[Callable[[], object]] = [save_weights, save_moments]
            if self.saves_full_weights:
                write = partial(self.weight_format.save, folder, TRANSFORMER, config=self.config)
                writes.append(partial(write_gathered, self.weights(), write, is_main=self.is_main))
            if self.is_main:
                writes.append(partial(write_state_and_config, folder, state, self.config))
            run_all_writes(writes)

    def load(self, checkpoint: Path) -> None:
        """See Engine.load; the world size may differ from the checkpoint's."""
        groups = hyperparameters(self.optimizer)
        options = replace(self.options, strict=not self.weight_format.trainable_only)
        with _quiet():
            if self.shards:
                weights = get_model_state_dict(self.model, options=self.options)
                _load_distributed({"model": weights}, checkpoint / WEIGHTS_FOLDER)
                set_model_state_dict(self.model, weights, options=options)
                self.shards.load(self.optimizer, checkpoint / OPTIMIZER_FOLDER)
                return
            weights, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
            _load_distributed({"model": weights}, checkpoint / WEIGHTS_FOLDER)
            _load_distributed(_optimizer_tensors(optimizer), checkpoint / OPTIMIZER_FOLDER)
            set_state_dict(
                self.model, self.optimizer, model_state_dict=weights, optim_state_dict=optimizer, options=options
            )
        restore_hyperparameters(self.optimizer, groups)
        has_shards = any(local_part(parameter).numel() for parameter in self.trainable)
        # accelerate's own loading silently leaves the state empty under FSDP1; training would restart the moments.
        if has_shards and not self.optimizer.state:
            raise RuntimeError(f"{checkpoint / OPTIMIZER_FOLDER} was read, but the optimizer has no state")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.weights: one full tensor at a time."""
        _restore_parameters(self.model)
        with _quiet():
            sharded = get_model_state_dict(self.model, options=self.options)
        for name, tensor in sharded.items():
            if name in self.parameters or not self.weight_format.trainable_only:
                yield name, _full_tensor(tensor)

    def fp32_params(self) -> Fp32Params:
        """See Engine.fp32_params."""

        def read(name: str) -> Tensor:
            return local_part(self.parameters[name].detach())

        return Fp32Params(
            tuple(self.parameters),
            read,
            lambda name, values: read(name).copy_(values),
            before_swap=partial(_reshard_all, self.model),
            sharded=True,
            group=self.group,
        )


def _optimizer_tensors(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return only an optimizer's tensors: its settings are those of the launch, and would be saved as pickles."""
    return {"optimizer": {"state": optimizer["state"]}}


def refuse_unknown_layers(names: Sequence[str] | None, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise UserError if a layer class to wrap is not in the model; accelerate would end with a traceback.

    Raises:
        UserError: with the classes of the model's blocks.
    """
    found = {type(module).__name__ for module in model.modules()}
    missing = [name for name in names or () if name not in found]
    if missing:
        hint = ",".join(dict.fromkeys(type(block).__name__ for block in blocks))
        raise UserError(
            "--fsdp_transformer_layer_cls_to_wrap", f"the model has no layer class {missing[0]}", f"pass {hint}"
        )


def _wrap_fsdp2(accelerator: Accelerator, transformer: nn.Module) -> nn.Module:
    """Return the model under FSDP2: parameters become float32 DTensors that are gathered in the compute dtype."""
    compute = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if compute is not None:
        compute_in_bf16(transformer, accelerator.device)
    # It warns of in-place operations on a block's output; diffusers' models have none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # accelerate prepares a model for FSDP2 only together with an optimizer. It gets one that is not used; the real one
    # is made over the shards afterwards.
    with_gradients = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return accelerator.prepare(transformer, torch.optim.SGD(with_gradients, lr=0.0))[0]


def _allocate_shards(model: nn.Module, accelerator: Accelerator) -> None:
    """Allocate uninitialized memory for shards on the meta device; tensors that have memory are unchanged."""
    offloaded = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    device = torch.device("cpu") if offloaded else accelerator.device
    # Not to_empty, which would also discard the buffers' values. FSDP's _apply replaces its shards as for to_empty.
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _local_shards(model: nn.Module, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, this rank's shard, its slice of the stored tensor) of each parameter."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise TypeError(f"{name} is not sharded")
        sizes, begins = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        own = tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
        yield name, parameter.to_local(), stored[name][own]


def _wrap_fsdp1(accelerator: Accelerator, transformer: nn.Module) -> nn.Module:
    """Return the model under FSDP1; accelerate makes it compute under autocast.

    Raises:
        UserError: a sharding strategy that shards nothing, or only within a node.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.sharding_strategy not in SHARDING_STRATEGIES:
        what = f"{plugin.sharding_strategy.name} is not supported"
        raise UserError(
            "--fsdp_sharding_strategy", what, f"pass {' or '.join(s.name for s in SHARDING_STRATEGIES)}, or launch DDP"
        )
    compute = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    # The model reads its parameters' dtype, and some of them may be frozen: both fail with flattened parameters.
    plugin.use_orig_params = True
    plugin.mixed_precision_policy = MixedPrecision(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False, cast_root_forward_inputs=False
    )
    with _quiet():
        model = accelerator.prepare_model(transformer)
    model.register_forward_pre_hook(lambda module, _: _restore_parameters(module))
    return model


def _reshard_all(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass leaves; the next one would reuse them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            if handle is not None and handle.uses_sharded_strategy:  # false for a single process
                _reshard(module, handle, True)


def _restore_parameters(model: nn.Module) -> None:
    """Turn the plain tensors that FSDP1 leaves after a forward pass into parameters again, where it shards nothing.

    This affects a single process in float32: modules outside the blocks that get no gradient. The next forward pass
    would treat the tensors as new parameters, and a state dict would lack them.
    """
    for module in model.modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None and not handle.uses_sharded_strategy:
            handle._use_unsharded_views(as_params=True)


def _process_group(model: Any, parameter: nn.Parameter) -> dist.ProcessGroup:  # noqa: ANN401 - of either version
    """Return the process group across which a parameter is sharded."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
    return model.process_group


def _full_tensor(tensor: Any) -> Tensor:  # noqa: ANN401 - a shard of either version, or a plain tensor
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(tensor, ShardedTensor):
        is_first = dist.get_rank() == 0
        # torch receives the shards on the device of `out` and sends them from the one that the process group needs:
        # with NCCL both have to be the GPU. A GPU has room for one full tensor, but not for all of them.
        device = tensor._get_preferred_device()
        full = torch.empty(tensor.size(), dtype=tensor.dtype, device=device) if is_first else None
        tensor.gather(0, full)
        return full.cpu() if full is not None else torch.empty(0)
    return tensor


def _save_distributed(state: Mapping[str, Any], folder: Path) -> None:
    """Write a distributed checkpoint; a failure on any rank is raised on every rank."""
    try:
        dcp.save(dict(state), checkpoint_id=folder)
    except CheckpointException as error:
        raise SaveError(_first_cause(error)) from error


def _load_distributed(state: dict[str, Any], folder: Path) -> None:
    """Read a distributed checkpoint into a state's tensors.

    Raises:
        UserError: (MODEL) it does not fit this model, cannot be read, or contains pickled objects that no checkpoint
            needs.
    """
    # torch unpickles this file, so unknown objects in it are refused first. The tensors themselves it reads safely.
    read_pickle(folder / METADATA)
    # With flattening, a rank without a piece of some small tensor would treat the file as one of an old torch version.
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    try:
        dcp.load(state, checkpoint_id=folder, planner=planner)
    except CheckpointException as error:
        hint = "resume with the model and flags that it was saved with"
        raise UserError(str(folder), f"cannot be read ({_first_cause(error)})", hint, MODEL) from error


def _first_cause(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {cause}"


class _quiet(warnings.catch_warnings):
    """Suppresses torch's warnings that FSDP1 and ShardedTensor are deprecated: the user cannot act on them."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*(ShardedTensor|state_dict_type|_get_pg_default_device).*")
        warnings.filterwarnings("ignore", message="Multiple backends are registered with this ProcessGroup")
