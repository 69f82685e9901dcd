"""Serves both training loops under FSDP1 and FSDP2: weights, gradients and optimizer divided among the processes."""

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
    OptimizerOver,
    Update,
    compute_in_bf16,
    hyperparameters,
    restore_hyperparameters,
    write_all,
    write_gathered,
    write_run,
)
from videox.engine.fsdp_local_optim import LocalShards
from videox.engine.train_state import TrainState, checkpoint_bytes
from videox.errors import MODEL, UserError
from videox.files import SaveError
from videox.models.meta_init import fill
from videox.optim.build import set_learning_rate, step_if
from videox.optim.ema import Fp32Params
from videox.weights.format import TRANSFORMER, FullWeights, WeightFormat
from videox.weights.safe_pickle import read_pickle
from videox.weights.safetensors_io import TensorSource

# accelerate's names for the two parts, so that `accelerate merge-weights checkpoint-N/pytorch_model_fsdp_0` works.
WEIGHTS_FOLDER, OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"
METADATA = ".metadata"
DIVIDED = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)


class FsdpEngine:
    """See Engine. Each layer class that the launcher names is gathered for its own computation alone.

    Gradients are divided after every micro-batch: kept whole until the step's last, they would fill the device.

    Args:
        accelerator: of the run, with FSDP resolved.
        transformer: of diffusers, float32, its trained parameters chosen; on the host, or a creation.skeleton.
        blocks: its repeated blocks, for the sentence about a layer class that it has not.
        make_optimizer: makes the optimizer over parameters by name.
        stored: the weights of a skeleton (FSDP2), of which each process reads its own shards.
        whole_weights: checkpoints also have transformer/, float32, gathered tensor by tensor.
        kept: what checkpoints hold of the model (None = all); what is trained alone they also hold gathered.
        by_shard: the optimizer knows no divided tensors (FSDP2): it is made over each process's own shards.

    Raises:
        UserError: the launcher names a layer class that is not in the model, or a sharding strategy that is not covered.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        blocks: Sequence[nn.Module],
        make_optimizer: OptimizerOver,
        *,
        stored: TensorSource | None = None,
        whole_weights: bool = False,
        kept: WeightFormat | None = None,
        by_shard: bool = False,
    ) -> None:
        self.kept = kept or FullWeights()
        plugin = accelerator.state.fsdp_plugin
        refuse_unknown_layers(plugin.transformer_cls_names_to_wrap, transformer, blocks)
        self.is_main = accelerator.is_main_process
        self.config = transformer.to_json_string()  # type: ignore[operator]
        self.saves_whole = whole_weights or self.kept.trained_alone
        whole, frozen = 4 if self.saves_whole else 0, 0 if self.kept.trained_alone else 4
        self.checkpoint_bytes = checkpoint_bytes(transformer, trained=12 + whole, frozen=frozen and frozen + whole)
        self.options = StateDictOptions(ignore_frozen_params=self.kept.trained_alone)
        wrap = _fully_shard if plugin.fsdp_version == 2 else _wrap
        self.model = self.network = wrap(accelerator, transformer.train())
        if stored:
            _give_memory(self.model, accelerator)
            fill(_shards(self.model, stored), stored.folder)
        parameters = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in self.model.named_parameters()}
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.group = _group(self.model, next(iter(self.parameters.values())))
        self.shards: LocalShards | None = None
        if by_shard:
            rank, world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
            self.shards = LocalShards(parameters, rank=rank, world_size=world_size)
        self.optimizer = make_optimizer(self.shards.parameters if self.shards else parameters)
        stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.trained = list(self.parameters.values()) if self.shards else stepped
        self.moments_on_host = self.trained[0].device.type == "cpu"  # fsdp_offload_params

    def set_lr(self, rate: float) -> None:
        """As Engine's."""
        set_learning_rate(self.optimizer, rate)

    def update(self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor]) -> Update:
        """As Engine's."""
        gradients = [_local(parameter.grad) for parameter in self.trained if parameter.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.trained[0].device)
        if gradients:
            squares += torch.nn.utils.get_total_norm(gradients).double() ** 2
        dist.all_reduce(squares, group=self.group)
        norm = squares.sqrt()
        applied = norm.isfinite() & loss.isfinite()
        if empty:
            applied = torch.zeros_like(applied)
        else:
            scale = (limit(norm) / (norm + 1e-6)).clamp(max=1.0)
            if gradients:  # a process may hold no piece of what is trained
                torch._foreach_mul_(gradients, scale.float())
            if self.shards:
                self.shards.take_gradients()
            step_if(self.optimizer, applied)
        self.discard()
        return Update(norm, applied)

    def discard(self) -> None:
        """As Engine's."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.trained:  # the optimizer may step shards of them
            parameter.grad = None

    def save(self, folder: Path, state: TrainState) -> None:
        """As Engine's: torch's distributed checkpoints, each process its own shards; transformer/ if asked for."""
        _name_parameters(self.model)
        with _quiet():
            if self.shards:
                weights = get_model_state_dict(self.model, options=self.options)
                moments = partial(self.shards.save, self.optimizer, folder / OPTIMIZER_FOLDER)
            else:
                weights, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
                moments = partial(_write, _moments(optimizer), folder / OPTIMIZER_FOLDER)
            parts: list[Callable[[], object]] = [
                partial(_write, {"model": weights}, folder / WEIGHTS_FOLDER), moments,
            ]  # fmt: skip
            if self.saves_whole:
                write = partial(self.kept.save, folder, TRANSFORMER, config=self.config)
                parts.append(partial(write_gathered, self.weights(), write, is_main=self.is_main))
            if self.is_main:
                parts.append(partial(write_run, folder, state, self.config))
            write_all(parts)

    def load(self, checkpoint: Path) -> None:
        """As Engine's; at any number of processes."""
        groups = hyperparameters(self.optimizer)
        options = replace(self.options, strict=not self.kept.trained_alone)
        with _quiet():
            if self.shards:
                weights = get_model_state_dict(self.model, options=self.options)
                _read({"model": weights}, checkpoint / WEIGHTS_FOLDER)
                set_model_state_dict(self.model, weights, options=options)
                self.shards.load(self.optimizer, checkpoint / OPTIMIZER_FOLDER)
                return
            weights, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
            _read({"model": weights}, checkpoint / WEIGHTS_FOLDER)
            _read(_moments(optimizer), checkpoint / OPTIMIZER_FOLDER)
            set_state_dict(
                self.model, self.optimizer, model_state_dict=weights, optim_state_dict=optimizer, options=options
            )
        restore_hyperparameters(self.optimizer, groups)
        holds_some = any(_local(parameter).numel() for parameter in self.trained)
        if holds_some and not self.optimizer.state:  # what accelerate's own loading leaves under FSDP1, without a word
            raise RuntimeError(f"{checkpoint / OPTIMIZER_FOLDER} was read, and the optimizer has no state")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """As Engine's: one tensor at a time is whole."""
        _name_parameters(self.model)
        with _quiet():
            sharded = get_model_state_dict(self.model, options=self.options)
        for name, tensor in sharded.items():
            if name in self.parameters or not self.kept.trained_alone:
                yield name, _whole(tensor)

    def fp32_params(self) -> Fp32Params:
        """As Engine's."""

        def read(name: str) -> Tensor:
            return _local(self.parameters[name].detach())

        return Fp32Params(
            tuple(self.parameters),
            read,
            lambda name, values: read(name).copy_(values),
            settle=partial(_drop_gathered, self.model),
            divided=True,
            group=self.group,
        )


def _moments(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's tensors alone: its settings are the launch's, and would go to disk as pickles."""
    return {"optimizer": {"state": optimizer["state"]}}


def refuse_unknown_layers(names: Sequence[str] | None, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuses layer classes to wrap that the model does not have; accelerate would end with a traceback.

    Raises:
        UserError: with the classes that it has.
    """
    found = {type(module).__name__ for module in model.modules()}
    missing = [name for name in names or () if name not in found]
    if missing:
        hint = ",".join(dict.fromkeys(type(block).__name__ for block in blocks))
        raise UserError("--fsdp_transformer_layer_cls_to_wrap", f"no layer here is a {missing[0]}", f"give {hint}")


def _fully_shard(accelerator: Accelerator, transformer: nn.Module) -> nn.Module:
    """Returns the model under FSDP2: its parameters become DTensors, float32, gathered in the compute dtype."""
    compute = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if compute is not None:
        compute_in_bf16(transformer, accelerator.device)
    # accelerate takes a model together with an optimizer only; ours is made over the shards, where they lie.
    with_gradients = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return accelerator.prepare(transformer, torch.optim.SGD(with_gradients, lr=0.0))[0]


def _give_memory(model: nn.Module, accelerator: Accelerator) -> None:
    """Gives the shards of a skeleton memory, uninitialised, where FSDP keeps shards; what has memory stays."""
    offloaded = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    device = torch.device("cpu") if offloaded else accelerator.device
    # to_empty would empty the buffers as well; FSDP's own _apply takes the new shards over, as it does for to_empty
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _shards(model: nn.Module, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, this process's shard, its slice of the stored tensor) of each parameter."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise TypeError(f"{name} is not divided")
        sizes, begins = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        own = tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
        yield name, parameter.to_local(), stored[name][own]


def _wrap(accelerator: Accelerator, transformer: nn.Module) -> nn.Module:
    """Returns the model under FSDP1; accelerate has it compute under autocast.

    Raises:
        UserError: a sharding strategy that divides nothing, or the nodes from each other.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.sharding_strategy not in DIVIDED:
        what = f"{plugin.sharding_strategy.name} is not supported"
        raise UserError(
            "--fsdp_sharding_strategy", what, f"give {' or '.join(s.name for s in DIVIDED)}, or launch DDP"
        )
    compute = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    plugin.use_orig_params = True  # the model asks its own parameters for their dtype, and parts may be frozen
    plugin.mixed_precision_policy = MixedPrecision(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False, cast_root_forward_inputs=False
    )
    with _quiet():
        model = accelerator.prepare_model(transformer)
    model.register_forward_pre_hook(lambda module, _: _name_parameters(module))
    return model


def _drop_gathered(model: nn.Module) -> None:
    """Frees the whole weights that a forward pass without a backward pass leaves, which the next one would reuse."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            if handle is not None and handle.uses_sharded_strategy:  # one process divides nothing
                _reshard(module, handle, True)


def _name_parameters(model: nn.Module) -> None:
    """Makes parameters again of what FSDP1 leaves as bare tensors after a forward pass, where it divides nothing.

    One process in float32: what lies outside the blocks and sees no gradient. The next forward pass would take the
    tensors for new parameters, and a state dict would be without them.
    """
    for module in model.modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None and not handle.uses_sharded_strategy:
            handle._use_unsharded_views(as_params=True)


def _group(model: Any, parameter: nn.Parameter) -> dist.ProcessGroup:  # noqa: ANN401 - of either version
    """Returns the processes among which a tensor is divided."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
    return model.process_group


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Any) -> Tensor:  # noqa: ANN401 - a shard of either version, or a plain tensor
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(tensor, ShardedTensor):
        whole = torch.empty(tensor.size(), dtype=tensor.dtype) if dist.get_rank() == 0 else torch.empty(0)
        tensor.gather(0, whole if dist.get_rank() == 0 else None)
        return whole
    return tensor


def _write(state: Mapping[str, Any], folder: Path) -> None:
    """Writes a distributed checkpoint; a failure anywhere is raised on every process."""
    try:
        dcp.save(dict(state), checkpoint_id=folder)
    except CheckpointException as error:
        raise SaveError(_first_cause(error)) from error


def _read(state: dict[str, Any], folder: Path) -> None:
    """Reads a distributed checkpoint into a state's tensors.

    Raises:
        UserError: (MODEL) it does not fit this model, cannot be read, or holds what no checkpoint needs.
    """
    read_pickle(folder / METADATA)  # refuses what torch should not unpickle; the tensors themselves it reads safely
    # Flattened, a process without a piece of a small tensor would take the file for one of an old torch.
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    try:
        dcp.load(state, checkpoint_id=folder, planner=planner)
    except CheckpointException as error:
        hint = "resume with the model and flags it was saved with"
        raise UserError(str(folder), f"cannot be read ({_first_cause(error)})", hint, MODEL) from error


def _first_cause(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {cause}"


class _quiet(warnings.catch_warnings):
    """Keeps back torch's notes that its FSDP1 and ShardedTensor are being replaced: no user can act on them."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*(ShardedTensor|state_dict_type|_get_pg_default_device).*")
        warnings.filterwarnings("ignore", message="Multiple backends are registered with this ProcessGroup")
