"""Serves resume: the few numbers that a run is, and how they, weights and optimizer go to disk and come back."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from videox.checkpoint import read_manifest
from videox.data.plan import PlanSettings, check_world_size
from videox.distributed import BACKENDS, Backend
from videox.errors import MODEL, Refusal
from videox.files import write_json_atomically
from videox.optimizer_state import load_optimizer_tensors, optimizer_tensors
from videox.weights import StoredTensors, load_weights, save_tensors, save_weights

STATE_FILE = "trainer_state.json"
OPTIMIZER_STEM = "optimizer"


@dataclass
class TrainState:
    """Where a run stands. Order, noise, timesteps and learning rate are functions of these numbers.

    step: optimizer steps done; epoch, epoch_step: the same within the epoch; seed; slots: G of the plan; index: the
    index's fingerprint; settings: of the plan; quarantined: rows that this epoch's plan leaves out; bad: rows found
    bad since; skipped: steps without an update; skipped_in_row: the last ones of them without pause.
    """

    seed: int
    slots: int
    index: str
    settings: dict[str, Any]
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    quarantined: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    skipped: int = 0
    skipped_in_row: int = 0

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
        Refusal: the file is missing or of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return TrainState(**{name.name: found[name.name] for name in fields(TrainState)})
    except (OSError, ValueError, KeyError, TypeError) as why:
        raise Refusal(
            str(path), f"is not a readable trainer state ({why})", "resume from another checkpoint", MODEL
        ) from why


def plan_inputs(settings: PlanSettings) -> dict[str, Any]:
    """Returns the plan's settings as plain JSON values, for storing and comparing."""
    return json.loads(json.dumps(asdict(settings)))


def refuse_changed_plan(state: TrainState, index_fingerprint: str, settings: PlanSettings) -> None:
    """Refuses to resume when data or settings would give another schedule than the one that was interrupted.

    Raises:
        Refusal: naming what changed, with both values.
    """
    now, then = _flat(plan_inputs(settings)), _flat(state.settings)
    changed = [f"{name} was {then.get(name)}, is {now.get(name)}" for name in now if now.get(name) != then.get(name)]
    if index_fingerprint != state.index:
        changed.append("the data's rows, captions or sizes are others")
    if changed:
        mend = "resume with what the run began with, or start a new one in another --output_dir from its weights (--transformer_path)"
        raise Refusal("--resume_from_checkpoint", "the schedule would change: " + "; ".join(changed), mend, MODEL)


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
    gather: Callable[[Any], list[Any]],
) -> tuple[TrainState, PlanSettings]:
    """Returns the state of a checkpoint, or of a new run, and the plan's settings that go with it.

    Args:
        checkpoint: None for a new run.
        settings_of: makes the plan's settings from `seed` and `slots`.
        seed: asked for; None takes the checkpoint's, or draws one that all processes share.
        slots: processes x accumulation of this launch; a checkpoint's own number wins, accumulation adapts to it.
        world_size: processes of this launch; it must divide the slots.
        index_fingerprint: of the data.
        gather: collective that returns every process's value.

    Raises:
        Refusal: the schedule would change, or world_size does not divide the slots.
    """
    state = read_state(checkpoint) if checkpoint else None
    drawn = gather(secrets.randbits(32))[0] if seed is None and state is None else seed
    chosen = state.seed if state and drawn is None else int(drawn or 0)
    settings = settings_of(seed=chosen, slots=state.slots if state else slots)
    check_world_size(settings.slots, world_size)
    if state:
        refuse_changed_plan(state, index_fingerprint, settings)
        return state, settings
    return TrainState(chosen, slots, index_fingerprint, plan_inputs(settings)), settings


def refuse_other_backend(checkpoint: Path | None, backend: Backend, processes: int) -> None:
    """Refuses a checkpoint that another kind of backend saved, or another number of processes where that matters.

    Args:
        checkpoint: None for a new run.
        backend: that runs.
        processes: of this launch.

    Raises:
        Refusal: naming both, with the way to start from its weights.
    """
    if checkpoint is None:
        return
    manifest = read_manifest(checkpoint)
    saved = BACKENDS[manifest["description"].get("backend", "single")]
    same = saved.kind == backend.kind if backend.kind == "whole" else saved.name == backend.name
    if not same:
        mend = f"launch it under {saved.name}, or start a new run from its weights (--transformer_path)"
        raise Refusal(str(checkpoint), f"was saved under {saved.name}, this launch is {backend.name}", mend, MODEL)
    if not backend.elastic and manifest["world_size"] != processes:
        what = f"was saved by {manifest['world_size']} processes under {backend.name}, this launch has {processes}"
        raise Refusal(str(checkpoint), what, f"launch {manifest['world_size']} processes", MODEL)


def checkpoint_bytes(model: torch.nn.Module, *, trained: int = 12, frozen: int = 4) -> int:
    """Returns the size of one checkpoint.

    Args:
        model: its parameters, before anything divides them.
        trained: bytes for each number of a trained parameter: float32 weight and two moments.
        frozen: the same of a frozen one.
    """
    return sum(p.numel() * (trained if p.requires_grad else frozen) for p in model.parameters())


def save_state(
    folder: Path, *, state: TrainState, model: torch.nn.Module, config: str, optimizer: torch.optim.Optimizer
) -> None:
    """Writes transformer/ (float32 masters, diffusers layout), optimizer tensors and trainer_state.json into a folder.

    Args:
        config: the model's configuration as diffusers writes it (JSON text).
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    save_weights(folder / "transformer", model.state_dict(), config)
    save_tensors(folder / OPTIMIZER_STEM, optimizer_tensors(optimizer, names), stem=OPTIMIZER_STEM)
    write_state(folder, state)


def write_state(folder: Path, state: TrainState) -> None:
    """Writes trainer_state.json into a folder."""
    write_json_atomically(folder / STATE_FILE, asdict(state))


def load_state(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's weights and optimizer state back, in place and to the bit.

    Raises:
        Refusal: a tensor is missing, extra or of another shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    load_weights(checkpoint / "transformer", model)
    load_optimizer_tensors(optimizer, names, StoredTensors(checkpoint / OPTIMIZER_STEM, OPTIMIZER_STEM))
