"""Serves both training loops: how the weights in training are stepped, saved and loaded, whatever keeps them.

An Engine is what a backend makes of the model: DdpEngine here, FsdpEngine in fsdp.py, DeepSpeedEngine in zero.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from videox.engine.train_state import TrainState, checkpoint_bytes, load_state, save_state, write_state
from videox.optim.build import clip_gradients, gradient_norm, set_learning_rate, step_if
from videox.optim.cpu_offload import CpuOffloadOptimizer
from videox.optim.ema import Fp32Params
from videox.run.checkpoint import SAVE_ERRORS
from videox.weights.format import FullWeights, WeightFormat
from videox.weights.safetensors_io import write_config

OptimizerOver = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


class Update(NamedTuple):
    """How a step ended: scalars that the host may read when the device has come so far.

    grad_norm: global, before clipping; applied: boolean, the weights were stepped.
    """

    grad_norm: Tensor
    applied: Tensor


class Engine(Protocol):
    """The model in training. All processes call its methods together; with sharded weights each is a collective.

    Attributes:
        model: called in training.
        network: called by validation and sampling; with sharded weights by all processes equally often.
        config: of the model, as diffusers writes it (JSON text).
        checkpoint_bytes: size of a checkpoint.
        kept: what checkpoints and `weights` hold of the model.
        moments_on_host: the optimizer's take no memory of the device.
    """

    model: nn.Module
    network: Any
    config: str
    checkpoint_bytes: int
    kept: WeightFormat
    moments_on_host: bool

    def set_lr(self, rate: float) -> None:
        """Sets the learning rate of the next step, times each group's rate_factor."""

    def update(self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor]) -> Update:
        """Steps the weights by the accumulated gradients, unless loss or gradients are not finite, and empties these.

        Whether they are is found and obeyed on the device, so that the host goes on.

        Args:
            loss: of the step, over all processes: scalar on the device.
            empty: no sample of the step could be read, so that its gradients are zero: no step.
            limit: the norm to clip to, from the norm, both scalars on the device.
        """

    def discard(self) -> None:
        """Drops the gradients accumulated since the last step."""

    def save(self, folder: Path, state: TrainState) -> None:
        """Writes what resuming needs into a folder that all processes share.

        Raises:
            OSError, SafetensorError, SaveError: a write failed, after every collective is through.
        """

    def load(self, checkpoint: Path) -> None:
        """Puts back, to the bit, what save wrote. Raises UserError where it does not fit."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the state dict, or what is trained alone, whole tensor by whole tensor, float32 masters if any.

        Every process must ask for all of them, since each may be a collective; they are right on the main process.
        """

    def fp32_params(self) -> Fp32Params:
        """Returns this process's part of the trained weights in float32, to read and to exchange."""


class DdpEngine:
    """Weights whole on each process: a single one, or DDP.

    Args:
        accelerator: of the run.
        transformer: of diffusers, float32, its trained parameters chosen.
        make_optimizer: makes the optimizer over parameters by name.
        kept: what checkpoints hold of the model (None = all).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: nn.Module,
        make_optimizer: OptimizerOver,
        kept: WeightFormat | None = None,
    ) -> None:
        self.is_main, self.kept = accelerator.is_main_process, kept or FullWeights()
        self.config = transformer.to_json_string()  # type: ignore[operator]
        self.network = transformer.to(accelerator.device)
        self.optimizer = make_optimizer(dict(transformer.named_parameters()))
        self.moments_on_host = isinstance(self.optimizer, CpuOffloadOptimizer)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.model = accelerator.prepare_model(transformer.train())
        self.checkpoint_bytes = checkpoint_bytes(transformer, frozen=0 if self.kept.trained_alone else 4)

    def set_lr(self, rate: float) -> None:
        """As Engine's."""
        set_learning_rate(self.optimizer, rate)

    def update(self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor]) -> Update:
        """As Engine's."""
        norm = gradient_norm(self.trained)
        applied = norm.isfinite() & loss.isfinite()
        if empty:
            applied = torch.zeros_like(applied)
        else:
            clip_gradients(self.trained, norm, limit(norm))
            step_if(self.optimizer, applied)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def discard(self) -> None:
        """As Engine's."""
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path, state: TrainState) -> None:
        """As Engine's: transformer/ in diffusers layout, and the optimizer's tensors."""
        if self.is_main:
            save_state(
                folder,
                state=state,
                model=self.network,
                config=self.config,
                optimizer=self.optimizer,
                kept=self.kept,
            )

    def load(self, checkpoint: Path) -> None:
        """As Engine's."""
        load_state(checkpoint, self.network, self.optimizer, self.kept)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """As Engine's."""
        if self.kept.trained_alone:
            yield from ((name, p.detach()) for name, p in self.network.named_parameters() if p.requires_grad)
        else:
            yield from self.network.state_dict().items()

    def fp32_params(self) -> Fp32Params:
        """As Engine's: all of them."""
        trained = {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}
        return Fp32Params(tuple(trained), trained.__getitem__, lambda name, values: trained[name].copy_(values))


# ------------------------------------------------------------------------------------- what sharded engines share


def compute_in_bf16(module: nn.Module, device: torch.device) -> None:
    """Has the module compute under autocast to bfloat16 and return float32, as accelerate does for whole weights.

    Its inputs stay as they are: a backend that casts them would round the timestep, 0 to 1000, to eight bits.
    """
    module.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(module.forward))


def write_all(parts: Iterable[Callable[[], object]]) -> None:
    """Runs every part, also after one has failed to write, since each may be a collective; then raises the failure."""
    failure: Exception | None = None
    for part in parts:
        try:
            part()
        except SAVE_ERRORS as error:
            failure = failure or error
    if failure is not None:
        raise failure


def write_run(folder: Path, state: TrainState, config: str) -> None:
    """Writes trainer_state.json, and the model's config.json beside sharded weights."""
    write_state(folder, state)
    write_config(folder, config)


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - torch's or DeepSpeed's
    """Returns each group's settings without its parameters: they are this launch's, whatever a checkpoint holds."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_hyperparameters(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    """Puts back what hyperparameters() returned."""
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update(kept)


def drain(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Asks for the rest of an Engine's weights, as every process must that does not write them."""
    for _ in tensors:
        pass


def written_by_main(
    tensors: Iterator[tuple[str, Tensor]],
    write: Callable[[Iterator[tuple[str, Tensor]]], object],
    expected: tuple[type[Exception], ...],
    *,
    is_main: bool,
) -> Exception | None:
    """Has the main process write what all processes gather, each tensor to the last one whatever happens.

    Returns:
        The failure, of one of the classes expected, for the caller to raise when no collective is to follow.
    """
    try:
        if is_main:
            write(tensors)
    except expected as error:
        return error
    finally:
        drain(tensors)
    return None


def write_gathered(
    tensors: Iterator[tuple[str, Tensor]], write: Callable[[Iterator[tuple[str, Tensor]]], object], *, is_main: bool
) -> None:
    """Has the main process write an Engine's weights while all gather them, one tensor at a time.

    Raises:
        OSError, SafetensorError: the write failed; the rest has been gathered all the same.
    """
    failure = written_by_main(tensors, write, SAVE_ERRORS, is_main=is_main)
    if failure is not None:
        raise failure
