"""Serves both training loops where --use_ema is given: an engine that keeps the average of its weights beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from videox.engine.base import Engine, Update, write_all, written_by_main
from videox.engine.train_state import TrainState
from videox.errors import MODEL, UserError
from videox.files import SaveError, write_json_atomically
from videox.lora.checkpoint import LoraWeights
from videox.optim.ema import Ema
from videox.run.checkpoint import SAVE_ERRORS
from videox.weights.format import TRANSFORMER
from videox.weights.layout_writer import export_file
from videox.weights.safetensors_io import export_transformer

EMA_FOLDER = "transformer_ema"  # in a checkpoint in float32, in output_dir as --export_dtype says
UPDATES_FILE = "ema.json"


class EmaEngine:
    """See Engine. The engine given trains; after each step that it takes, the average of its weights follows.

    Args:
        engine: of the backend.
        is_main: on the one process that writes.
        decay: see videox.optim.ema.decay_at.
        device: where the average is kept (None = beside the weights).
        whole_bytes: size of the whole model in float32.
    """

    def __init__(
        self, engine: Engine, *, is_main: bool, decay: float, device: torch.device | None, whole_bytes: int
    ) -> None:
        self.engine, self.is_main = engine, is_main
        self.model, self.network, self.config, self.kept = engine.model, engine.network, engine.config, engine.kept
        self.fp32_params, self.weights, self.set_lr = engine.fp32_params, engine.weights, engine.set_lr
        self.discard, self.moments_on_host = engine.discard, engine.moments_on_host
        self.checkpoint_bytes = engine.checkpoint_bytes + whole_bytes
        self.ema = Ema(engine.fp32_params(), decay=decay, device=device)

    def update(self, *, loss: Tensor, empty: bool, limit: Callable[[Tensor], Tensor]) -> Update:
        """As Engine's."""
        update = self.engine.update(loss=loss, empty=empty, limit=limit)
        self.ema.update(update.applied)
        return update

    def averaged(self) -> AbstractContextManager[None]:
        """Has `network` and `weights` be those of the average inside; all processes enter and leave together."""
        return self.ema.in_place()

    def save(self, folder: Path, state: TrainState) -> None:
        """As Engine's, and transformer_ema/ in diffusers layout, float32."""
        write_all([partial(self.engine.save, folder, state), partial(self._save_average, folder / EMA_FOLDER)])

    def _save_average(self, folder: Path) -> None:
        def write(weights: Iterator[tuple[str, Tensor]]) -> None:
            self.kept.save(folder.parent, folder.name, weights, self.config)
            write_json_atomically(folder / UPDATES_FILE, {"updates": self.ema.updates, "decay": self.ema.decay})

        with self.averaged():
            failure = written_by_main(self.weights(), write, SAVE_ERRORS, is_main=self.is_main)
        if failure is not None:
            raise failure

    def load(self, checkpoint: Path) -> None:
        """As Engine's; where the checkpoint holds no average, it begins as the weights are."""
        self.engine.load(checkpoint)
        self.ema.begin()
        folder = checkpoint / EMA_FOLDER
        if folder.is_dir():
            self.ema.load(self.kept.stored(checkpoint, EMA_FOLDER), _updates(folder / UPDATES_FILE))


def _updates(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["updates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"cannot be read ({type(error).__name__}: {error})"
        raise UserError(str(path), what, "resume from another checkpoint", MODEL) from error


def export_weights(
    engine: Engine,
    output_dir: Path,
    dtype: torch.dtype,
    keep_fp32: Sequence[str],
    *,
    is_main: bool,
    layouts: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    only_layouts: bool = False,
) -> None:
    """Writes output_dir/transformer for use, and transformer_ema where there is an average; all processes call it.

    Args:
        engine: between two steps.
        output_dir: of the run, or another folder.
        dtype: of the floating tensors.
        keep_fp32: parts of names that stay float32.
        is_main: on the one process that writes; the others take part in gathering.
        layouts: others than diffusers' to write the same in, as output_dir/transformer_LAYOUT.safetensors.
        metadata: for the files' headers.
        only_layouts: of a whole model, keep these and not the folders.

    Raises:
        UserError: (NUMERICS) a tensor is not finite in its dtype; that folder is not written.
        SaveError: the disk refused.
    """
    places: dict[str, Callable[[], AbstractContextManager[None]]] = {TRANSFORMER: nullcontext}
    if isinstance(engine, EmaEngine):
        places[EMA_FOLDER] = engine.averaged
    failures = []
    told = dict(metadata or {})

    def write_as(folder: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
        if isinstance(engine.kept, LoraWeights):
            engine.kept.export(
                output_dir, folder.name, weights, engine.config,
                dtype=dtype, keep_fp32=keep_fp32, layouts=layouts, metadata=told,
            )  # fmt: skip
            return
        export_transformer(weights, engine.config, folder, dtype, keep_fp32, metadata=told)
        for layout in layouts:
            export_file(folder, folder.with_name(f"{folder.name}_{layout}.safetensors"), layout, dtype, told)
        if only_layouts:
            shutil.rmtree(folder)

    for name, in_place in places.items():
        write = partial(write_as, output_dir / name)
        with in_place():
            failures.append(written_by_main(engine.weights(), write, (UserError, SaveError), is_main=is_main))
    for failure in failures:
        if failure is not None:
            raise failure


def average_notes(checkpoint: Path | None, use_ema: bool) -> list[str]:
    """Returns a line where a resumed run begins an average late, or goes on without the one that it had.

    Args:
        checkpoint: to resume from, None for a new run.
        use_ema: what this launch asks for.
    """
    there = checkpoint is not None and (checkpoint / EMA_FOLDER).is_dir()
    if checkpoint is None or there == use_ema:
        return []
    if use_ema:
        return [f"--use_ema: {checkpoint.name} holds no EMA, which begins here, as the weights are"]
    return [f"--use_ema is not given: the EMA of {checkpoint.name} is not carried on"]
