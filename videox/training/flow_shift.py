"""The flow shift of a run: one value for training, held-out loss and sample clips, and where it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from videox.errors import MODEL, UserError
from videox.models.config_files import SHIPPED_YAML, read_shift, read_yaml
from videox.models.configured import Component
from videox.models.scheduler import CONFIG, scheduler_shift
from videox.run.checkpoint import read_manifest
from videox.training.argument_parser import AUTO


class FlowShift(NamedTuple):
    """The flow shift of a run.

    Attributes:
        value: above 0; 1 = no shift.
        source: where it comes from, in words.
        notes: lines for the user, where a resumed run keeps another value than its flags and model give.
    """

    value: float
    source: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.value:g} ({self.source})"


def choose_shift(
    args: argparse.Namespace,
    checkpoint: Path | None,
    scheduler: Component | None,
    *,
    named_yaml: str | None = None,
    shipped_yaml: str | None = None,
) -> FlowShift:
    """Return the flow shift of a run.

    A new run takes it from --flow_shift, else from the yaml that the user names, else from the model's scheduler, else
    from the shipped yaml. A resumed run keeps the value that it began with.

    Args:
        checkpoint: to resume from; None for a new run.
        scheduler: of the model; None in a layout without one.
        named_yaml: --config_path; None if the user did not pass it, or the family has no such flag.
        shipped_yaml: the yaml for models without a scheduler; None if the family has none.

    Raises:
        UserError: no value is found, or one is not a number above 0.
    """
    if named_yaml:
        read_yaml(named_yaml)  # also where its value is not used: a path that does not exist is never ignored
    asked = _of_new_run(args, scheduler, named_yaml, shipped_yaml)
    if checkpoint is None:
        return asked
    stored = read_manifest(checkpoint)["description"].get("shift")
    if stored is not None:
        kept = float(stored)
    elif yaml := named_yaml or shipped_yaml:  # versions that stored no shift took it from there for every Wan2.1
        kept = read_shift(yaml)
    else:
        kept = _of_model(scheduler)[0] or asked.value
    source = f"{checkpoint.name}: a resumed run keeps its own"
    if kept == asked.value:
        return FlowShift(kept, source)
    start = "--init_lora_from" if args.lora_rank else "--transformer_path"
    other = f"{asked.value:g} ({asked.source})"
    note = (
        f"flow shift {other} has no effect on a resumed run, which keeps {kept:g}: to train with the other value, start a "
        f"new run in another --output_dir from its weights ({start})"
    )
    return FlowShift(kept, source, (note,))


def _of_new_run(
    args: argparse.Namespace, scheduler: Component | None, named_yaml: str | None, shipped_yaml: str | None
) -> FlowShift:
    if args.flow_shift != AUTO:
        return FlowShift(args.flow_shift, "--flow_shift")
    if named_yaml:
        return FlowShift(read_shift(named_yaml), f"{named_yaml} of --config_path")
    value, place = _of_model(scheduler)
    if value is not None:
        return FlowShift(value, f"the model's {place}")
    if shipped_yaml:
        return FlowShift(read_shift(shipped_yaml), f"{Path(shipped_yaml).name}: the model's folder has none")
    what = "the configuration has no flow shift"
    raise UserError(place, what, "pass --flow_shift (docs/flow_shift.md has the published values)", MODEL)


def _of_model(scheduler: Component | None) -> tuple[float | None, str]:
    """Return the shift of the model's scheduler, None if it has none, and its file below the model's folder."""
    if scheduler is None:
        return None, CONFIG
    published = scheduler.path.suffix == ".json"  # of a dry run: all components are in one file
    place = f"scheduler in config/models/{scheduler.path.name}" if published else f"{scheduler.path.name}/{CONFIG}"
    return scheduler_shift(scheduler.config, scheduler.path), place


def with_default_yaml(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags by name with the shipped yaml for a --config_path that was not passed.

    Older versions recorded its path, so that the names of runs and their args.json contain it.
    """
    default = {"config_path": SHIPPED_YAML} if asked.get("config_path", "") is None else {}
    return {**asked, **default}
