"""EmaEngine: wraps a backend's engine and keeps an EMA of its weights (--use_ema)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from videox.engine.base import NO_BOUNDS, Bounds, Engine, Update, run_all_writes, write_on_main
from videox.engine.saved_state import EMA, SavedTensor
from videox.engine.train_state import TrainState
from videox.errors import MODEL, UserError
from videox.files import write_json_atomically
from videox.optim.ema import Ema
from videox.run.checkpoint import SAVE_ERRORS

EMA_FOLDER = "transformer_ema"  # float32 in a checkpoint, in --export_dtype in output_dir
UPDATES_FILE = "ema.json"


class EmaEngine:
    """Engine that updates an EMA of its weights after each applied step of the wrapped engine.

    Args:
        engine: of the backend.
        is_main: true on the one rank that writes.
        decay: see videox.optim.ema.decay_at.
        device: where the EMA is stored (None = beside the weights).
        full_weights_bytes: size of what checkpoints contain of the EMA, in float32.
    """

    def __init__(
        self, engine: Engine, *, is_main: bool, decay: float, device: torch.device | None, full_weights_bytes: int
    ) -> None:
        self.engine, self.is_main = engine, is_main
        self.model, self.network = engine.model, engine.network
        self.config, self.weight_format = engine.config, engine.weight_format
        self.fp32_params, self.weights, self.set_lr = engine.fp32_params, engine.weights, engine.set_lr
        self.zero_grad, self.moments_on_host = engine.zero_grad, engine.moments_on_host
        self.replicated_weights = engine.replicated_weights
        self.checkpoint_bytes = engine.checkpoint_bytes + full_weights_bytes
        self.ema = Ema(engine.fp32_params(), decay=decay, device=device)

    def update(
        self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor], bounds: Bounds = NO_BOUNDS
    ) -> Update:
        """See Engine.update."""
        update = self.engine.update(loss=loss, empty=empty, limit=limit, bounds=bounds)
        self.ema.update(update.applied)
        return update

    def ema_weights(self) -> AbstractContextManager[None]:
        """Return a context in which `network` and `weights` have the EMA weights. Collective."""
        return self.ema.swapped()

    def saved_tensors(self) -> Iterator[SavedTensor]:
        """See Engine.saved_tensors; also the EMA."""
        yield from self.engine.saved_tensors()
        if self.is_main or self.ema.fp32_params.sharded:
            yield from (SavedTensor(EMA, name, shard) for name, shard in self.ema.shards.items())

    def save(self, folder: Path, state: TrainState) -> None:
        """See Engine.save; also transformer_ema/ in diffusers layout, float32."""
        run_all_writes([partial(self.engine.save, folder, state), partial(self._save_ema, folder / EMA_FOLDER)])

    def _save_ema(self, folder: Path) -> None:
        def write(weights: Iterator[tuple[str, Tensor]]) -> None:
            self.weight_format.save(folder.parent, folder.name, weights, self.config)
            write_json_atomically(folder / UPDATES_FILE, {"updates": self.ema.updates, "decay": self.ema.decay})

        with self.ema_weights():
            failure = write_on_main(self.weights(), write, SAVE_ERRORS, is_main=self.is_main)
        if failure is not None:
            raise failure

    def load(self, checkpoint: Path) -> None:
        """See Engine.load; if the checkpoint has no EMA, it starts as a copy of the loaded weights."""
        self.engine.load(checkpoint)
        self.ema.reset()
        folder = checkpoint / EMA_FOLDER
        if folder.is_dir():
            self.ema.load(self.weight_format.stored(checkpoint, EMA_FOLDER), _read_updates(folder / UPDATES_FILE))


def _read_updates(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["updates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"cannot be read ({type(error).__name__}: {error})"
        raise UserError(str(path), what, "resume from another checkpoint", MODEL) from error


def ema_notes(checkpoint: Path | None, use_ema: bool) -> list[str]:
    """Return a line if a resumed run starts its EMA late, or continues without the EMA of its checkpoint.

    Args:
        checkpoint: to resume from, None for a new run.
        use_ema: the value of --use_ema in this launch.
    """
    saved = checkpoint is not None and (checkpoint / EMA_FOLDER).is_dir()
    if checkpoint is None or saved == use_ema:
        return []
    if use_ema:
        return [f"--use_ema: {checkpoint.name} has no EMA; it starts here from the loaded weights"]
    return [f"--use_ema is not set: the EMA of {checkpoint.name} is not continued"]
