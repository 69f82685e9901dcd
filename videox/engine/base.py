"""Engine: the interface through which the training loop steps, saves and loads a model, whatever backend has it.

Implementations: DdpEngine in ddp.py, FsdpEngine in fsdp.py, DeepSpeedEngine in deepspeed.py; EmaEngine in ema.py wraps
one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from videox.engine.saved_state import SavedTensor
from videox.engine.train_state import TrainState, write_state
from videox.optim.ema import Fp32Params
from videox.run.checkpoint import SAVE_ERRORS
from videox.weights.format import WeightFormat
from videox.weights.safetensors_io import write_config

OptimizerFactory = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


class Bounds(NamedTuple):
    """The largest loss and gradient norm that a step may have; a step above them is skipped. Infinity: no bound."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_BOUNDS = Bounds()


class Update(NamedTuple):
    """Result of an optimizer step; scalars that may still be on their way from the device.

    Attributes:
        grad_norm: global gradient norm before clipping.
        applied: boolean, whether the weights were updated.
    """

    grad_norm: Tensor
    applied: Tensor


class Engine(Protocol):
    """A model in training. All ranks call its methods together; with sharded weights each call is a collective.

    Attributes:
        model: the module to call in training.
        network: the module to call in validation and sampling; with sharded weights all ranks call it equally often.
        config: of the model, as diffusers writes it (JSON text).
        checkpoint_bytes: size of a checkpoint.
        weight_format: what checkpoints and `weights` contain: the full model, or only what is trained.
        moments_on_host: the optimizer's moments use no device memory.
    """

    model: nn.Module
    network: Any
    config: str
    checkpoint_bytes: int
    weight_format: WeightFormat
    moments_on_host: bool

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step; each group multiplies it by its rate_factor."""

    def update(
        self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor], bounds: Bounds = NO_BOUNDS
    ) -> Update:
        """Step the weights by the accumulated gradients and reset these; skip the step if anything is not finite.

        Whether loss and gradient norm are finite is checked on the device, so the host does not wait. All ranks skip
        the same steps.

        Args:
            loss: of the step, over all ranks: scalar on the device.
            empty: no sample of the step could be read, so its gradients are zero and the step is skipped.
            limit: maps the gradient norm to the norm to clip to, both scalars on the device.
            bounds: the step is also skipped if its loss or its gradient norm is above them; equal on all ranks.
        """

    def zero_grad(self) -> None:
        """Drop the gradients accumulated since the last step."""

    def saved_tensors(self) -> Iterator[SavedTensor]:
        """Yield the weights and moments that this rank saves, for a check of their values. No collective.

        Tensors that all ranks have alike are yielded on the rank that writes them only.
        """

    def replicated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that all ranks have alike, in the same order on each; none if they are sharded.

        They are the model's own tensors, on this rank's device. No collective.
        """

    def save(self, folder: Path, state: TrainState) -> None:
        """Write what resuming needs into a folder that all ranks share.

        Raises:
            OSError, SafetensorError, SaveError: a write failed; raised after the last collective.
        """

    def load(self, checkpoint: Path) -> None:
        """Load what save wrote, bit-identical. Raises UserError if it does not fit."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state dict, or only what is trained, one full tensor at a time, from fp32 master weights if any.

        Every rank must consume all of them, since each may be a collective; the values are right on the main rank.
        """

    def fp32_params(self) -> Fp32Params:
        """Return this rank's part of the trainable parameters in float32, to read and to swap."""


def may_step(norm: Tensor, loss: Tensor, bounds: Bounds) -> Tensor:
    """Return whether gradient norm and loss are finite and within the bounds: boolean scalar on the norm's device.

    That is the device of the parameters. With offloaded parameters (fsdp_offload_params) the norm is on the CPU and
    the loss on the GPU. A result on the GPU would be copied by the optimizer without waiting, and its kernel on the
    CPU could read the flag before it is there.
    """
    good_loss = loss.isfinite() & (loss <= bounds.loss)
    if good_loss.device != norm.device:
        good_loss = good_loss.to(norm.device)
    return norm.isfinite() & (norm <= bounds.grad_norm) & good_loss


# ------------------------------------------------------------------------------- helpers of the sharded engines


def compute_in_bf16(module: nn.Module, device: torch.device) -> None:
    """Make the module compute under autocast to bfloat16 and return float32, as accelerate does for DDP.

    Inputs are not cast: a backend that casts them would round the timestep, 0 to 1000, to eight bits.
    """
    module.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(module.forward))


def run_all_writes(writes: Iterable[Callable[[], object]]) -> None:
    """Call every function, also after one has failed to write, and raise the first failure at the end.

    Each may be a collective: a rank that stopped at its failure would leave the others waiting.
    """
    failure: Exception | None = None
    for write in writes:
        try:
            write()
        except SAVE_ERRORS as error:
            failure = failure or error
    if failure is not None:
        raise failure


def write_state_and_config(folder: Path, state: TrainState, config: str) -> None:
    """Write trainer_state.json, and the model's config.json beside sharded weights."""
    write_state(folder, state)
    write_config(folder, config)


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - torch's or DeepSpeed's
    """Return each group's settings without its parameters.

    To be restored after loading a checkpoint: settings are this launch's, whatever the checkpoint has.
    """
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_hyperparameters(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    """Put back what hyperparameters() returned."""
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)


def drain(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Consume the rest of an Engine's weights, as every rank must that does not write them."""
    for _ in tensors:
        pass


def write_on_main(
    tensors: Iterator[tuple[str, Tensor]],
    write: Callable[[Iterator[tuple[str, Tensor]]], object],
    expected: tuple[type[Exception], ...],
    *,
    is_main: bool,
) -> Exception | None:
    """Write on the main rank what all ranks gather; every tensor is gathered even if the write fails.

    Returns:
        The failure, of one of the `expected` classes, for the caller to raise after the last collective.
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
    """Write an Engine's weights on the main rank while all ranks gather them, one tensor at a time.

    Raises:
        OSError, SafetensorError: the write failed; all tensors have been gathered nevertheless.
    """
    failure = write_on_main(tensors, write, SAVE_ERRORS, is_main=is_main)
    if failure is not None:
        raise failure
