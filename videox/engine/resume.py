"""Whether a launch continues a run: what must not change, what may, and where a run begins."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videox.data.choices import AT_ONCE, NEXT_EPOCH
from videox.data.plan.epoch import check_world_size
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.distributed.backends import BACKENDS, Backend
from videox.engine.changed_rows import lost_rows, refuse_changed_rows
from videox.engine.train_state import (
    LATER_DEFAULTS,
    OPTIMIZER_STEM,
    NextData,
    TrainState,
    plan_inputs,
    read_state,
    run_name,
)
from videox.errors import MODEL, UserError
from videox.optim.registry import OPTIMIZERS, moments_of
from videox.run.checkpoint import read_manifest
from videox.weights.safetensors_io import StoredTensors

# Settings that a run's first launch decides for all later ones.
FIRST_LAUNCH = ("slots", "barrier", "accumulation", "cost_linear", "cost_quadratic")
# Settings that a run's version decided: later versions decide otherwise, but not for a run that goes on.
OF_VERSION = ("held_out_choice", "timesteps")
# Values of settings that older checkpoints do not have: what their runs were planned with, by default or by flags that
# did not exist yet.
OLD_DEFAULTS = {"barrier": "step", "accumulation": 1, "balance": "none"}
OLD_FLAGS = {"policy.sample_fps": 0.0, "clips_per_video": 1, "clip_sampling": "random"}
# Names of moments that only one optimizer has.
UNIQUE_MOMENTS = {"p0": "prodigy", "RMS": "came", "state1": "adamw8bit", "exp_avg@codes": "adamw8bit_bf16"}


START_FLAG = "--transformer_path"


@dataclass(frozen=True)
class IndexedData:
    """The data of this launch, as the plan sees it, and what is done if it is not the data of the resumed run.

    Attributes:
        fingerprint: of the index, over everything that the plan reads.
        names: fingerprint of the rows' names alone.
        columns: the values that the plan reads, one per row.
        captionless: bool [rows], True for a row without a caption; None = every row has one.
        name_of: returns how a message names a row.
        sources: a line about each list or folder that the rows come from.
        accept: "" refuses changed data; one of ACCEPTED otherwise.
        changes_since: returns how the rows differ from those with the given fingerprint of an index; None if these
            are not stored.
        start_flag: the flag that starts a new run from the weights of this one.
    """

    fingerprint: str
    names: str
    columns: PlanColumns
    captionless: np.ndarray | None = None
    name_of: Callable[[int], str] = str
    sources: tuple[str, ...] = ()
    accept: str = ""
    changes_since: Callable[[str], Sequence[object] | None] = lambda _: None
    start_flag: str = START_FLAG

    def stored_sources(self) -> list[str]:
        """The sources as a checkpoint has them; a single list may be moved, and its checkpoints then stay the same."""
        return list(self.sources) if len(self.sources) > 1 else []


# Flags of those plan settings that are not named like their flag.
FLAGS_OF_SETTINGS = {
    "policy.n_frames": "video_sample_n_frames", "policy.stride": "video_sample_stride",
    "policy.sample_fps": "video_sample_fps", "policy.grid": "bucket_grid", "policy.token_length": "training_with_video_token_length",
    "batch_size": "train_batch_size", "held_out": "validation_rows",
    "held_out_share": "validation_share", "held_out_list": "validation_meta",
}  # fmt: skip
# Settings that follow from the model, the launch or the version.
WITHOUT_FLAG = {
    "policy.min_frames",
    "policy.ratios",
    "slots",
    "cost_linear",
    "cost_quadratic",
    "barrier",
    "accumulation",
    "dealing",
    "held_out_choice",
    "timesteps",
}


def refuse_changed_plan(
    state: TrainState, settings: PlanSettings, data: IndexedData | None = None, changed_rows: Sequence[str] = ()
) -> None:
    """Raise UserError if data or settings would give another schedule than that of the interrupted run.

    Args:
        state: of the interrupted run.
        settings: of this launch's plan.
        data: of this launch, if it is other data than the run's; None = the same data.
        changed_rows: how the rows differ, for the message.

    Raises:
        UserError: with each changed setting, its old and its new value.
    """
    now = LATER_DEFAULTS | _flatten(plan_inputs(settings))
    then = OLD_DEFAULTS | OLD_FLAGS | LATER_DEFAULTS | _flatten(state.settings)
    changed = [
        f"{_setting_name(name)} was {_shown(then.get(name))}, is {_shown(now.get(name))}"
        for name in now
        if now.get(name) != then.get(name)
    ]
    only_data = data is not None and not changed
    if data is not None:
        known = state.next_data or state
        line = "the data's rows, captions or sizes have changed" + _changed_sources(known.sources, data.sources)
        changed.append(line + (f": {'; '.join(changed_rows)}" if changed_rows else ""))
    if changed:
        accept = "add --accept_data_change to train the new data from the next epoch on, " if only_data else ""
        if only_data and state.epoch_step and not changed_rows:  # the rows of the epoch are not stored
            accept = f"add --accept_data_change={AT_ONCE} to train the new data at once, "
        start = data.start_flag if data is not None else START_FLAG
        hint = f"{accept}resume with the original data and flags, or start a new run in another --output_dir from its weights ({start})"
        what = changed[0] if only_data else "the schedule would change: " + "; ".join(changed)
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)


def _setting_name(name: str) -> str:
    """Return a plan setting as messages name it: by its flag, if it has one."""
    if name in WITHOUT_FLAG:
        return name
    return f"--{FLAGS_OF_SETTINGS.get(name, name.removeprefix('policy.'))}"


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
    kept = {name: settings.get(name, LATER_DEFAULTS[name]) for name in OF_VERSION}
    if "barrier" in settings:
        return {name: settings[name] for name in FIRST_LAUNCH} | kept
    if settings.get("slot_fill") == "cost":
        what = "the run was started by an older version, which filled slots by cost in another way"
        hint = "start a new run in another --output_dir from its weights (--transformer_path)"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)
    return {**OLD_DEFAULTS, **{name: settings[name] for name in FIRST_LAUNCH if name in settings}, **kept}


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
    drawn = gather(secrets.randbits(32))[0] if seed is None and state is None else seed
    chosen_seed = state.seed if state and drawn is None else int(drawn or 0)
    settings = settings_of(seed=chosen_seed, **(first_launch_settings(state) if state else {"slots": slots}))
    check_world_size(settings.slots, world_size)
    if state:
        _continue_with(state, settings, data)
        return state, settings
    name = run_name(flags_name, data.fingerprint, settings)
    inputs = plan_inputs(settings)
    state = TrainState(
        chosen_seed, slots, data.fingerprint, inputs, name,
        names=data.names, sources=data.stored_sources(), columns=data.columns,
    )  # fmt: skip
    return state, settings


def _continue_with(state: TrainState, settings: PlanSettings, data: IndexedData) -> None:
    """Check the data of this launch against that of the run, and put into the state what changed and is accepted.

    Rows that can no longer be read change the fingerprint, and must not end the run: it goes on with the columns that
    it began with.
    """
    known = state.next_data or state
    comparable = known.columns if known.names == data.names else None
    only_lost = comparable is not None and lost_rows(comparable, data.columns, data.captionless) is not None
    if only_lost or data.fingerprint == known.index:
        refuse_changed_plan(state, settings)
        known.sources = data.stored_sources()
        known.columns = known.columns if only_lost else data.columns
        if state.next_data and data.accept == AT_ONCE:
            _accept(state, state.next_data, data)
        return
    if data.accept:
        refuse_changed_plan(state, settings)
        _accept(state, NextData(data.fingerprint, data.names, data.stored_sources(), data.columns), data)
        return
    changes = data.changes_since(known.index)
    if changes is None and comparable is not None:
        refuse_changed_rows(comparable, data.columns, data.name_of)
    refuse_changed_plan(state, settings, data, shorten(changes or []))


def _accept(state: TrainState, new: NextData, data: IndexedData) -> None:
    """Go on with the new data: from this step on at the start of an epoch or AT_ONCE, otherwise from the next epoch.

    Raises:
        UserError: the epoch cannot be finished, since its rows are not stored.
    """
    if state.epoch_step and data.accept == NEXT_EPOCH:
        if data.changes_since(state.index) is None:
            what = "the rows that this epoch began with are not stored, so that it cannot be finished with them"
            hint = f"add ={AT_ONCE} to leave out the rest of the epoch and train the new data at once"
            raise UserError("--accept_data_change", what, hint, MODEL)
        state.next_data = new
        return
    if state.epoch_step:
        state.epoch, state.epoch_step = state.epoch + 1, 0
    state.use_data(new)


def shorten(changes: Sequence[object], most: int = 5) -> list[str]:
    """Return the first `most` changes in words, and how many more there are."""
    return [*map(str, changes[:most]), *([f"and {len(changes) - most} more"] if len(changes) > most else [])]


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
