"""TrainState: the values that define where a run is, and how they, weights and optimizer are saved and resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.errors import MODEL, UserError
from videox.files import mode_of_umask, write_json_atomically
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.shapes import USUAL
from videox.weights.format import TRANSFORMER, FullWeights, WeightFormat
from videox.weights.safetensors_io import StoredTensors, save_tensors

STATE_FILE = "trainer_state.json"
COLUMNS_FILE = "columns.safetensors"
NEXT_COLUMNS_FILE = "next_columns.safetensors"
# Later settings are left out of plan_inputs at these values, so that the names of runs without them stay.
LATER_DEFAULTS = {
    "caption_prefix": "", "trigger_word": "", "caption_shuffle_tags": False, "launch_tokens": 0,
    "held_out_choice": "random", "timesteps": "per_step", "held_out_share": 0.0, "held_out_list": "",
}  # fmt: skip
ASSIGNMENT_VERSION = 3  # increased when equal settings would assign samples to slots in another order than before
OPTIMIZER_STEM = "optimizer"


@dataclass
class NextData:
    """Changed data that a run trains from its next epoch on; the fields are those of TrainState."""

    index: str
    names: str
    sources: list[str]
    columns: PlanColumns | None = field(default=None, repr=False, compare=False)


@dataclass
class TrainState:
    """Where a run is. Order, noise, timesteps and learning rate are functions of these values.

    Attributes:
        seed: of the run.
        slots: micro-batches of a step over all ranks (G of the plan).
        index: fingerprint of the index.
        settings: of the plan, as JSON values.
        run: name of the run; only runs with equal numbers share it, see run_name.
        step: optimizer steps done.
        epoch: current epoch.
        epoch_step: steps done within the epoch.
        quarantined: rows that this epoch's plan leaves out.
        bad: rows found unreadable since the epoch began.
        skipped: steps without an update of the weights.
        skipped_in_row: number of consecutive skipped steps up to now.
        recent_losses: of the steps that the bound for spikes follows from, see videox.training.spikes.
        recent_grad_norms: of the same steps.
        spikes_in_row: number of consecutive steps above that bound up to now.
        names: fingerprint of the rows' names.
        sources: a line about each list or folder of the data if there are several; [] otherwise.
        data_changes: for each change of the data, the first step (0-based) and epoch that trained the new data, and
            the fingerprints of the index before and after it.
        next_data: changed data that waits for the end of the epoch; None = the data has not changed.
        loss_means: running means of the training loss, of videox.tracking.corrected_loss.
        columns: what the plan reads of the rows; saved in a separate file.
    """

    seed: int
    slots: int
    index: str
    settings: dict[str, Any]
    run: str
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    quarantined: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    skipped: int = 0
    skipped_in_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_grad_norms: list[float] = field(default_factory=list)
    spikes_in_row: int = 0
    names: str = ""
    sources: list[str] = field(default_factory=list)
    data_changes: list[dict[str, Any]] = field(default_factory=list)
    next_data: NextData | None = None
    loss_means: dict[str, Any] = field(default_factory=dict)
    columns: PlanColumns | None = field(default=None, repr=False, compare=False)

    @property
    def first_step_of_epoch(self) -> int:
        """The number of the current epoch's first step, from 0."""
        return self.step - self.epoch_step

    @property
    def later_quarantined(self) -> list[int]:
        """The rows that are known to be left out of the next epoch; rows of changed data are all tried again."""
        return [] if self.next_data else self.quarantined

    def advance(self, steps_of_epoch: int) -> bool:
        """Count one step; return whether it ended its epoch.

        The next epoch leaves out the rows that were found bad, or it begins with changed data.
        """
        self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
        if self.epoch_step < steps_of_epoch:
            return False
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self.quarantined, self.bad = sorted({*self.quarantined, *self.bad}), []
        if self.next_data:
            self.use_data(self.next_data)
        return True

    def use_data(self, data: NextData) -> None:
        """Go on with other data from this step on, which must be the first one of its epoch; no row is left out."""
        self.data_changes.append({"step": self.step, "epoch": self.epoch, "before": self.index, "after": data.index})
        self.index, self.names, self.sources, self.columns = data.index, data.names, data.sources, data.columns
        self.quarantined, self.bad, self.next_data = [], [], None


def read_state(checkpoint: Path) -> TrainState:
    """Return the state stored in a checkpoint.

    Raises:
        UserError: the file is missing or of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        # older versions did not write these fields
        absent: dict[str, Any] = {"sources": [], "data_changes": [], "next_data": None, "loss_means": {}}
        absent |= {"recent_losses": [], "recent_grad_norms": [], "spikes_in_row": 0}
        content = {**absent, **json.loads(path.read_text(encoding="utf-8"))}
        names = [each.name for each in fields(TrainState) if each.name != "columns"]
        state = TrainState(**{name: content[name] for name in names})
        state.columns = _read_columns(checkpoint / COLUMNS_FILE)
        if content["next_data"] is not None:
            state.next_data = NextData(**content["next_data"], columns=_read_columns(checkpoint / NEXT_COLUMNS_FILE))
        return state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        what = f"is not a readable trainer state ({error})"
        raise UserError(str(path), what, "resume from another checkpoint", MODEL) from error


def _read_columns(path: Path) -> PlanColumns | None:
    return PlanColumns(**load_file(path)) if path.is_file() else None


def plan_inputs(settings: PlanSettings) -> dict[str, Any]:
    """Return the plan's settings as plain JSON values, for storing and comparing."""
    version = {} if settings.balance == "none" else {"dealing": ASSIGNMENT_VERSION}
    values = {name: value for name, value in asdict(settings).items() if not _is_default(name, value)}
    if settings.policy.ratios == USUAL:
        del values["policy"]["ratios"]
    return json.loads(json.dumps(values | version))


def _is_default(name: str, value: object) -> bool:
    return name in LATER_DEFAULTS and LATER_DEFAULTS[name] == value


def run_name(flags: str, index: str, settings: PlanSettings) -> str:
    """Return a run's name. Runs with the same name train with equal numbers, whatever launched them.

    The order of samples depends on how a step is split across processes: 4 processes train another order than 2 with 2
    accumulation steps. A single process trains the order of one process per slot.

    Args:
        flags: a name of those flags that change numbers.
        index: the index's fingerprint.
        settings: of the plan.
    """
    inputs = plan_inputs(settings)
    if settings.accumulation == settings.slots:  # a single process
        inputs["accumulation"] = 1
    return hashlib.sha256(json.dumps([flags, index, inputs], sort_keys=True).encode()).hexdigest()[:16]


def checkpoint_bytes(model: torch.nn.Module, *, trained: int = 12, frozen: int = 4) -> int:
    """Return the size of one checkpoint, in bytes.

    Args:
        model: with full parameters, on any device (also meta), or sharded by DeepSpeed when it was created.
        trained: bytes per trainable parameter: float32 weight and two moments.
        frozen: bytes per frozen parameter.
    """
    return sum(
        getattr(p, "ds_numel", p.numel()) * (trained if p.requires_grad else frozen) for p in model.parameters()
    )


def save_state(
    folder: Path,
    *,
    state: TrainState,
    model: torch.nn.Module,
    config: str,
    optimizer: torch.optim.Optimizer,
    weight_format: WeightFormat | None = None,
) -> None:
    """Write transformer/ (fp32 weights, diffusers layout), optimizer tensors and trainer_state.json into a folder.

    Args:
        folder: of the checkpoint.
        state: of the run.
        model: in training, unwrapped.
        config: the model's configuration as diffusers writes it (JSON text).
        optimizer: whose moments are saved.
        weight_format: what to write of the weights (None = all of them).
    """
    weight_format = weight_format or FullWeights()
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weight_format.save(folder, TRANSFORMER, trained if weight_format.trainable_only else model.state_dict(), config)
    save_tensors(folder / OPTIMIZER_STEM, optimizer_tensors(optimizer, names), stem=OPTIMIZER_STEM)
    write_state(folder, state)


def write_state(folder: Path, state: TrainState) -> None:
    """Write trainer_state.json into a folder, and in separate files the columns that the plan reads."""
    values = {each.name: getattr(state, each.name) for each in fields(state) if each.name != "columns"}
    if state.next_data:
        values["next_data"] = {name: value for name, value in vars(state.next_data).items() if name != "columns"}
        _write_columns(folder / NEXT_COLUMNS_FILE, state.next_data.columns)
    write_json_atomically(folder / STATE_FILE, values)
    _write_columns(folder / COLUMNS_FILE, state.columns)


def _write_columns(path: Path, columns: PlanColumns | None) -> None:
    if columns is not None:
        arrays = {name: np.ascontiguousarray(column) for name, column in vars(columns).items() if column is not None}
        with mode_of_umask(path):
            save_file(arrays, path)


def load_state(
    checkpoint: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    weight_format: WeightFormat | None = None,
) -> None:
    """Load a checkpoint's weights and optimizer state, in place and bit-identical.

    Raises:
        UserError: a tensor is missing, extra or of another shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    (weight_format or FullWeights()).load(checkpoint, model)
    load_optimizer_tensors(optimizer, names, StoredTensors(checkpoint / OPTIMIZER_STEM, OPTIMIZER_STEM))
