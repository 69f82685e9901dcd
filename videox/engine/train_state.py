"""Serves resume: the few numbers that a run is, and how they, weights and optimizer go to disk and come back."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from videox.data.plan.plan import Columns, PlanSettings, check_world_size
from videox.distributed.accelerator import BACKENDS, Backend
from videox.errors import MODEL, UserError
from videox.files import write_json_atomically
from videox.optim.registry import OPTIMIZERS, moments_of
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.run.checkpoint import read_manifest
from videox.weights.format import TRANSFORMER, FullWeights, WeightFormat
from videox.weights.safetensors_io import StoredTensors, save_tensors

STATE_FILE = "trainer_state.json"
COLUMNS_FILE = "columns.safetensors"
# What a run's first launch decides for all of it; and what an older checkpoint, which lacks it, was planned with.
LAUNCHED = ("slots", "barrier", "accumulation", "cost_linear", "cost_quadratic")
OLDER = {"barrier": "step", "accumulation": 1, "balance": "none"}
LATER = {"policy.sample_fps": 0.0, "clips_per_video": 1, "clip_sampling": "random"}  # flags that it did not know
DEALING = 3  # rises when slots of equal settings are dealt in another order than before
OPTIMIZER_STEM = "optimizer"
OWN_MOMENTS = {"RMS": "came", "state1": "adamw8bit", "exp_avg@codes": "adamw8bit_bf16"}  # keys that one alone has


@dataclass
class TrainState:
    """Where a run stands. Order, noise, timesteps and learning rate are functions of these numbers.

    step: optimizer steps done; epoch, epoch_step: the same within the epoch; seed; slots: G of the plan; index: the
    index's fingerprint; settings: of the plan; run: its name, shared by equal runs only; quarantined: rows that this
    epoch's plan leaves out; bad: rows found bad since; skipped: steps without an update; skipped_in_row: the last ones
    of them without pause; names: of the rows, a fingerprint; columns: what the plan reads of them, in a file of its
    own.
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
    names: str = ""
    columns: Columns | None = field(default=None, repr=False, compare=False)

    def advance(self, steps_of_epoch: int) -> bool:
        """Counts one step; returns whether it ended its epoch. The next epoch leaves out what was found bad."""
        self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
        if self.epoch_step < steps_of_epoch:
            return False
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self.quarantined, self.bad = sorted({*self.quarantined, *self.bad}), []
        return True


def read_state(checkpoint: Path) -> TrainState:
    """Returns the state that a checkpoint holds.

    Raises:
        UserError: the file is missing or of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        state = TrainState(**{name.name: found[name.name] for name in fields(TrainState) if name.name != "columns"})
        if (checkpoint / COLUMNS_FILE).is_file():
            state.columns = Columns(**load_file(checkpoint / COLUMNS_FILE))
        return state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as why:
        raise UserError(
            str(path), f"is not a readable trainer state ({why})", "resume from another checkpoint", MODEL
        ) from why


def plan_inputs(settings: PlanSettings) -> dict[str, Any]:
    """Returns the plan's settings as plain JSON values, for storing and comparing."""
    dealing = {} if settings.balance == "none" else {"dealing": DEALING}
    return json.loads(json.dumps(asdict(settings) | dealing))


def name_of(flags: str, index: str, settings: PlanSettings) -> str:
    """Returns a run's name, which runs share whose every number is equal, whatever launched them.

    Its order follows from how a step is divided among processes: 4 processes train another than 2 with 2 accumulation
    steps. One process trains that of a process for each slot.

    Args:
        flags: a name of those flags that change numbers.
        index: the index's fingerprint.
        settings: of the plan.
    """
    inputs = plan_inputs(settings)
    if settings.accumulation == settings.slots:
        inputs["accumulation"] = 1
    return hashlib.sha256(json.dumps([flags, index, inputs], sort_keys=True).encode()).hexdigest()[:16]


def refuse_changed_plan(state: TrainState, index_fingerprint: str, settings: PlanSettings) -> None:
    """Refuses to resume when data or settings would give another schedule than the one that was interrupted.

    Raises:
        UserError: naming what changed, with both values.
    """
    now, then = _flat(plan_inputs(settings)), OLDER | LATER | _flat(state.settings)
    changed = [f"{name} was {then.get(name)}, is {now.get(name)}" for name in now if now.get(name) != then.get(name)]
    if index_fingerprint != state.index:
        changed.append("the data's rows, captions or sizes are others")
    if changed:
        hint = "resume with what the run began with, or start a new one in another --output_dir from its weights (--transformer_path)"
        raise UserError("--resume_from_checkpoint", "the schedule would change: " + "; ".join(changed), hint, MODEL)


def launched(state: TrainState) -> dict[str, Any]:
    """Returns those of the plan's settings that a run keeps from its first launch, whatever runs it now.

    Raises:
        UserError: an older version filled the slots by cost in a way that this one cannot repeat.
    """
    kept = {**state.settings, "slots": state.slots}
    if "barrier" in kept:
        return {name: kept[name] for name in LAUNCHED}
    if kept.get("slot_fill") == "cost":
        what = "the run was begun by an older version, which filled slots by cost otherwise"
        hint = "start a new run in another --output_dir from its weights (--transformer_path)"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)
    return {**OLDER, **{name: kept[name] for name in LAUNCHED if name in kept}}


def refuse_other_run(output_dir: Path, state: TrainState) -> None:
    """Refuses to go on with one run in the folder of another, whose records and checkpoints would become its own.

    Raises:
        UserError: output_dir holds another run than the checkpoint's.
    """
    try:
        there = json.loads((output_dir / "args.json").read_text(encoding="utf-8"))["resolved"]["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or one that never began
    if there != state.run:
        what = f"{output_dir} holds another run than the checkpoint's"
        hint = "give the checkpoint's own folder, or a new one, as --output_dir"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def resume_or_begin(
    checkpoint: Path | None,
    settings_of: Callable[..., PlanSettings],
    *,
    seed: int | None,
    slots: int,
    world_size: int,
    index_fingerprint: str,
    names: str,
    columns: Columns,
    run: str,
    gather: Callable[[Any], list[Any]],
) -> tuple[TrainState, PlanSettings]:
    """Returns the state of a checkpoint, or of a new run, and the plan's settings that go with it.

    Its columns are those that the run began with: a file that has gone bad since keeps its place in the schedule,
    where it is found, named and counted like any other.

    Args:
        checkpoint: None for a new run.
        settings_of: makes the plan's settings from `seed` and `slots`, and at a resume from what launched() returns.
        seed: asked for; None takes the checkpoint's, or draws one that all processes share.
        slots: processes x accumulation of this launch; a checkpoint's own number wins, accumulation adapts to it.
        world_size: processes of this launch; it must divide the slots.
        index_fingerprint: of the data; names: of its rows alone; columns: what the plan reads of it.
        run: name of the flags that a new run begins with.
        gather: collective that returns every process's value.

    Raises:
        UserError: the schedule would change, or world_size does not divide the slots.
    """
    state = read_state(checkpoint) if checkpoint else None
    drawn = gather(secrets.randbits(32))[0] if seed is None and state is None else seed
    chosen = state.seed if state and drawn is None else int(drawn or 0)
    settings = settings_of(seed=chosen, **(launched(state) if state else {"slots": slots}))
    check_world_size(settings.slots, world_size)
    if state:
        only_lost = (
            state.names == names and state.columns is not None and lost_rows(state.columns, columns) is not None
        )
        refuse_changed_plan(state, state.index if only_lost else index_fingerprint, settings)
        state.columns = state.columns if only_lost else columns
        return state, settings
    begun = name_of(run, index_fingerprint, settings)
    state = TrainState(chosen, slots, index_fingerprint, plan_inputs(settings), begun, names=names, columns=columns)
    return state, settings


def lost_rows(then: Columns, now: Columns) -> np.ndarray | None:
    """Returns the rows that could be read then and cannot now, if nothing else has changed; otherwise None."""
    both = then.usable & now.usable
    pairs = [
        (getattr(then, name), getattr(now, name)) for name in ("kind", "width", "height", "frames", "fps", "weight")
    ]
    same = [a is b if a is None or b is None else np.array_equal(a[both], b[both]) for a, b in pairs]
    return np.flatnonzero(then.usable & ~now.usable) if all(same) and not np.any(now.usable & ~then.usable) else None


def refuse_other_backend(checkpoint: Path | None, backend: Backend, optimizer: str) -> None:
    """Refuses a checkpoint that another kind of backend saved, or that holds the moments of another optimizer.

    Args:
        checkpoint: None for a new run.
        backend: that runs.
        optimizer: that was asked for, of videox.optim.registry.OPTIMIZERS.

    Raises:
        UserError: naming both, with the way to start from its weights.
    """
    if checkpoint is None:
        return
    described = read_manifest(checkpoint)["description"]
    saved = BACKENDS[described.get("backend", "single")]
    same = saved.kind == backend.kind if backend.kind == "whole" else saved.name == backend.name
    if not same:
        hint = f"launch it under {saved.name}, or start a new run from its weights (--transformer_path)"
        raise UserError(str(checkpoint), f"was saved under {saved.name}, this launch is {backend.name}", hint, MODEL)
    known = {described["optimizer"]} if "optimizer" in described else _optimizers_of_moments(checkpoint)
    if moments_of(optimizer) not in map(moments_of, known):
        names = " or ".join(sorted(known))
        hint = f"resume with --optimizer {names}, or begin a run in another --output_dir from these weights"
        what = f"{optimizer}, and {checkpoint.name} was saved with {names}, whose moments it cannot use"
        raise UserError("--optimizer", what, hint, MODEL)


def _optimizers_of_moments(checkpoint: Path) -> set[str]:
    """Returns who may have kept the moments of a checkpoint from before its manifest said so, by their names."""
    own = {name for name in OPTIMIZERS if moments_of(name) == name}
    if not (checkpoint / OPTIMIZER_STEM).is_dir():
        return own  # divided ones, which their engine checks
    keys = {name.rpartition("/")[2] for name in StoredTensors(checkpoint / OPTIMIZER_STEM, OPTIMIZER_STEM)}
    for key, name in OWN_MOMENTS.items():
        if key in keys:
            return {name}
    return own - {"came", "adamw8bit"} if "exp_avg" in keys else own


def checkpoint_bytes(model: torch.nn.Module, *, trained: int = 12, frozen: int = 4) -> int:
    """Returns the size of one checkpoint.

    Args:
        model: its parameters, whole, without memory, or divided by DeepSpeed as they were made.
        trained: bytes for each number of a trained parameter: float32 weight and two moments.
        frozen: the same of a frozen one.
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
    kept: WeightFormat | None = None,
) -> None:
    """Writes transformer/ (float32 masters, diffusers layout), optimizer tensors and trainer_state.json into a folder.

    Args:
        config: the model's configuration as diffusers writes it (JSON text).
        kept: what to write of the weights (None = all of them).
    """
    kept = kept or FullWeights()
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept.save(folder, TRANSFORMER, trained if kept.trained_alone else model.state_dict(), config)
    save_tensors(folder / OPTIMIZER_STEM, optimizer_tensors(optimizer, names), stem=OPTIMIZER_STEM)
    write_state(folder, state)


def write_state(folder: Path, state: TrainState) -> None:
    """Writes trainer_state.json into a folder, and the columns that the plan reads beside it."""
    numbers = {name.name: getattr(state, name.name) for name in fields(state) if name.name != "columns"}
    write_json_atomically(folder / STATE_FILE, numbers)
    if state.columns is not None:
        columns = {
            name: np.ascontiguousarray(column) for name, column in vars(state.columns).items() if column is not None
        }
        save_file(columns, folder / COLUMNS_FILE)


def load_state(
    checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, kept: WeightFormat | None = None
) -> None:
    """Puts a checkpoint's weights and optimizer state back, in place and to the bit.

    Raises:
        UserError: a tensor is missing, extra or of another shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    (kept or FullWeights()).load(checkpoint, model)
    load_optimizer_tensors(optimizer, names, StoredTensors(checkpoint / OPTIMIZER_STEM, OPTIMIZER_STEM))
