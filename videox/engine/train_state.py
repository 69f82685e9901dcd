"""TrainState: the values that define where a run is, and how they, weights and optimizer are saved and resumed."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from videox.data.plan.epoch import check_world_size
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.distributed.backends import BACKENDS, Backend
from videox.engine.changed_rows import lost_rows, refuse_changed_rows
from videox.errors import MODEL, UserError
from videox.files import write_json_atomically
from videox.optim.registry import OPTIMIZERS, moments_of
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.run.checkpoint import read_manifest
from videox.weights.format import TRANSFORMER, FullWeights, WeightFormat
from videox.weights.safetensors_io import StoredTensors, save_tensors

STATE_FILE = "trainer_state.json"
COLUMNS_FILE = "columns.safetensors"
# Settings that a run's first launch decides for all later ones.
FIRST_LAUNCH = ("slots", "barrier", "accumulation", "cost_linear", "cost_quadratic")
# Values of settings that older checkpoints do not have: what their runs were planned with, by default or by flags that
# did not exist yet.
OLD_DEFAULTS = {"barrier": "step", "accumulation": 1, "balance": "none"}
# Settings of captions are left out of plan_inputs at these values, so that the names of runs without them stay.
CAPTION_DEFAULTS = {"caption_prefix": "", "trigger_word": "", "caption_shuffle_tags": False}
OLD_FLAGS = {"policy.sample_fps": 0.0, "clips_per_video": 1, "clip_sampling": "random"}
ASSIGNMENT_VERSION = 3  # increased when equal settings would assign samples to slots in another order than before
OPTIMIZER_STEM = "optimizer"
# Names of moments that only one optimizer has.
UNIQUE_MOMENTS = {"p0": "prodigy", "RMS": "came", "state1": "adamw8bit", "exp_avg@codes": "adamw8bit_bf16"}


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
        names: fingerprint of the rows' names.
        sources: a line about each list or folder of the data if there are several; [] otherwise.
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
    names: str = ""
    sources: list[str] = field(default_factory=list)
    columns: PlanColumns | None = field(default=None, repr=False, compare=False)

    def advance(self, steps_of_epoch: int) -> bool:
        """Count one step; return whether it ended its epoch.

        The next epoch leaves out the rows that were found bad.
        """
        self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
        if self.epoch_step < steps_of_epoch:
            return False
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self.quarantined, self.bad = sorted({*self.quarantined, *self.bad}), []
        return True


def read_state(checkpoint: Path) -> TrainState:
    """Return the state stored in a checkpoint.

    Raises:
        UserError: the file is missing or of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        content = {"sources": [], **json.loads(path.read_text(encoding="utf-8"))}
        names = [each.name for each in fields(TrainState) if each.name != "columns"]
        state = TrainState(**{name: content[name] for name in names})
        if (checkpoint / COLUMNS_FILE).is_file():
            state.columns = PlanColumns(**load_file(checkpoint / COLUMNS_FILE))
        return state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        what = f"is not a readable trainer state ({error})"
        raise UserError(str(path), what, "resume from another checkpoint", MODEL) from error


def plan_inputs(settings: PlanSettings) -> dict[str, Any]:
    """Return the plan's settings as plain JSON values, for storing and comparing."""
    version = {} if settings.balance == "none" else {"dealing": ASSIGNMENT_VERSION}
    values = {name: value for name, value in asdict(settings).items() if not _is_default(name, value)}
    return json.loads(json.dumps(values | version))


def _is_default(name: str, value: object) -> bool:
    return name in CAPTION_DEFAULTS and CAPTION_DEFAULTS[name] == value


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


def refuse_changed_plan(
    state: TrainState, index_fingerprint: str, settings: PlanSettings, sources: Sequence[str] = ()
) -> None:
    """Raise UserError if data or settings would give another schedule than that of the interrupted run.

    Args:
        state: of the interrupted run.
        index_fingerprint: of this launch's data.
        settings: of this launch's plan.
        sources: a line about each list or folder of this launch's data; () leaves them out of the message.

    Raises:
        UserError: with each changed setting, its old and its new value.
    """
    now = CAPTION_DEFAULTS | _flatten(plan_inputs(settings))
    then = OLD_DEFAULTS | OLD_FLAGS | CAPTION_DEFAULTS | _flatten(state.settings)
    changed = [
        f"{name} was {_shown(then.get(name))}, is {_shown(now.get(name))}"
        for name in now
        if now.get(name) != then.get(name)
    ]
    if index_fingerprint != state.index:
        changed.append("the data's rows, captions or sizes have changed" + _changed_sources(state.sources, sources))
    if changed:
        hint = "resume with the original data and flags, or start a new run in another --output_dir from its weights (--transformer_path)"
        raise UserError("--resume_from_checkpoint", "the schedule would change: " + "; ".join(changed), hint, MODEL)


def _shown(value: object) -> str:
    """Return a setting's value as messages show it: text that is empty or has white space in quotes."""
    return repr(value) if isinstance(value, str) and len(value.split()) != 1 else str(value)


def _changed_sources(then: Sequence[str], now: Sequence[str]) -> str:
    """Return which sources of the data were removed, added or put in another place; "" where none was."""
    if list(then) == list(now) or (not then and len(now) <= 1):
        return ""
    if not then:
        return f" with its sources (one list or folder before, now: {', '.join(now)})"
    changes = {
        "no longer": [source for source in then if source not in now],
        "new": [source for source in now if source not in then],
    }
    named = [f"{name}: {', '.join(sources)}" for name, sources in changes.items() if sources]
    return f" with its sources ({'; '.join(named) or 'the same ones in another order'})"


def first_launch_settings(state: TrainState) -> dict[str, Any]:
    """Return those of the plan's settings that a run keeps from its first launch, whatever backend runs it now.

    Raises:
        UserError: an older version filled the slots by cost in a way that this one cannot repeat.
    """
    settings = {**state.settings, "slots": state.slots}
    if "barrier" in settings:
        return {name: settings[name] for name in FIRST_LAUNCH}
    if settings.get("slot_fill") == "cost":
        what = "the run was started by an older version, which filled slots by cost in another way"
        hint = "start a new run in another --output_dir from its weights (--transformer_path)"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)
    return {**OLD_DEFAULTS, **{name: settings[name] for name in FIRST_LAUNCH if name in settings}}


def refuse_other_run(output_dir: Path, state: TrainState) -> None:
    """Raise UserError if a run would continue in the folder of another, and mix records and checkpoints of both.

    Raises:
        UserError: output_dir contains another run than the checkpoint's.
    """
    try:
        run_in_folder = json.loads((output_dir / "args.json").read_text(encoding="utf-8"))["resolved"]["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no run, or one that ended before its first step
    if run_in_folder != state.run:
        what = f"{output_dir} contains another run than the checkpoint's"
        hint = "pass the checkpoint's own folder, or a new one, as --output_dir"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


@dataclass(frozen=True)
class IndexedData:
    """The data of this launch, as the plan sees it.

    Attributes:
        fingerprint: of the index, over everything that the plan reads.
        names: fingerprint of the rows' names alone.
        columns: the values that the plan reads, one per row.
        captionless: bool [rows], True for a row without a caption; None = every row has one.
        name_of: returns how a message names a row.
        sources: a line about each list or folder that the rows come from.
    """

    fingerprint: str
    names: str
    columns: PlanColumns
    captionless: np.ndarray | None = None
    name_of: Callable[[int], str] = str
    sources: tuple[str, ...] = ()


def resume_or_begin(
    checkpoint: Path | None,
    settings_of: Callable[..., PlanSettings],
    data: IndexedData,
    *,
    seed: int | None,
    slots: int,
    world_size: int,
    flags_name: str,
    gather: Callable[[Any], list[Any]],
) -> tuple[TrainState, PlanSettings]:
    """Return the state of a checkpoint, or of a new run, and the settings of its plan.

    A resumed run keeps the columns that it began with: a file that became unreadable since then keeps its place in
    the schedule, where it is found, reported and counted like any other bad sample. A row without a caption, which
    older versions did not train, stays left out of a run that began without it.

    Args:
        checkpoint: None for a new run.
        settings_of: makes the plan's settings from `seed` and `slots`, and on resume from first_launch_settings().
        data: the data of this launch.
        seed: the requested seed; None uses the checkpoint's, or draws one that all ranks share.
        slots: processes x gradient accumulation of this launch. A checkpoint's own number takes precedence, and the
            accumulation adapts to it.
        world_size: processes of this launch; it must divide the slots.
        flags_name: name of the flags that a new run begins with, see run_name.
        gather: collective that returns every rank's value.

    Raises:
        UserError: the schedule would change, or world_size does not divide the slots.
    """
    state = read_state(checkpoint) if checkpoint else None
    # A single list may be moved, and its checkpoints then stay the same.
    sources = list(data.sources) if len(data.sources) > 1 else []
    drawn = gather(secrets.randbits(32))[0] if seed is None and state is None else seed
    chosen_seed = state.seed if state and drawn is None else int(drawn or 0)
    settings = settings_of(seed=chosen_seed, **(first_launch_settings(state) if state else {"slots": slots}))
    check_world_size(settings.slots, world_size)
    if state:
        # Rows that can no longer be read change the fingerprint, and must not end the run: it goes on with the
        # columns it began with. Any other difference is refused.
        only_lost = (
            state.names == data.names
            and state.columns is not None
            and lost_rows(state.columns, data.columns, data.captionless) is not None
        )
        if state.names == data.names and state.columns is not None and not only_lost:
            refuse_changed_rows(state.columns, data.columns, data.name_of)
        refuse_changed_plan(state, state.index if only_lost else data.fingerprint, settings, data.sources)
        state.sources = sources
        state.columns = state.columns if only_lost else data.columns
        return state, settings
    name = run_name(flags_name, data.fingerprint, settings)
    inputs = plan_inputs(settings)
    state = TrainState(
        chosen_seed, slots, data.fingerprint, inputs, name,
        names=data.names, sources=sources, columns=data.columns,
    )  # fmt: skip
    return state, settings


def refuse_other_backend(checkpoint: Path | None, backend: Backend, optimizer: str) -> None:
    """Raise UserError for a checkpoint of another kind of backend, or with the moments of another optimizer.

    Args:
        checkpoint: None for a new run.
        backend: of this launch.
        optimizer: of this launch, a name of videox.optim.registry.OPTIMIZERS.

    Raises:
        UserError: with both names, and how to start from the checkpoint's weights.
    """
    if checkpoint is None:
        return
    description = read_manifest(checkpoint)["description"]
    saved = BACKENDS[description.get("backend", "single")]
    # Single process and DDP save the same files; ZeRO-2, ZeRO-3, FSDP1 and FSDP2 each have a format of their own.
    same = saved.engine == backend.engine if backend.engine == "replicated" else saved.name == backend.name
    if not same:
        hint = f"launch it under {saved.name}, or start a new run from its weights (--transformer_path)"
        raise UserError(str(checkpoint), f"was saved under {saved.name}, this launch is {backend.name}", hint, MODEL)
    known = {description["optimizer"]} if "optimizer" in description else _possible_optimizers(checkpoint)
    if moments_of(optimizer) not in map(moments_of, known):
        names = " or ".join(sorted(known))
        hint = f"resume with --optimizer {names}, or start a run in another --output_dir from these weights"
        what = f"{optimizer}, but {checkpoint.name} was saved with {names}, whose moments it cannot use"
        raise UserError("--optimizer", what, hint, MODEL)


def _possible_optimizers(checkpoint: Path) -> set[str]:
    """Return the names of the optimizers that may have saved a checkpoint whose manifest has no optimizer yet."""
    candidates = {name for name in OPTIMIZERS if moments_of(name) == name}
    if not (checkpoint / OPTIMIZER_STEM).is_dir():
        return candidates  # sharded moments, which their engine checks when it loads them
    keys = {name.rpartition("/")[2] for name in StoredTensors(checkpoint / OPTIMIZER_STEM, OPTIMIZER_STEM)}
    for key, name in UNIQUE_MOMENTS.items():
        if key in keys:
            return {name}
    return candidates - {"came", "adamw8bit", "prodigy"} if "exp_avg" in keys else candidates


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
    """Write trainer_state.json into a folder, and in a separate file the columns that the plan reads."""
    values = {each.name: getattr(state, each.name) for each in fields(state) if each.name != "columns"}
    write_json_atomically(folder / STATE_FILE, values)
    if state.columns is not None:
        columns = {
            name: np.ascontiguousarray(column) for name, column in vars(state.columns).items() if column is not None
        }
        save_file(columns, folder / COLUMNS_FILE)


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
