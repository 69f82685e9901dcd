"""The flow shift of a diffusers scheduler: read from its configuration, and set for sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.errors import MODEL, UserError

CONFIG = "scheduler_config.json"
# Names of the flow shift in schedulers: of UniPC, DPM-Solver++ and others; of FlowMatchEuler and its relatives.
SHIFT_KEYS = ("flow_shift", "shift")
SHIFT_LIMIT = 1000.0  # a flow shift is above 0 and below this


def scheduler_shift(config: Mapping[str, Any], folder: Path) -> float | None:
    """Return the flow shift in the configuration of a scheduler, None if it has none.

    Args:
        config: content of scheduler_config.json.
        folder: that contains the file, for the message.

    Raises:
        UserError: (MODEL) the value is not a number above 0 and below SHIFT_LIMIT.
    """
    key = next((key for key in SHIFT_KEYS if config.get(key) is not None), None)
    if key is None:
        return None
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < SHIFT_LIMIT:
        hint = "correct it in the file, or pass --flow_shift"
        raise UserError(str(folder / CONFIG), f"{key} is {value!r}, not a number above 0", hint, MODEL)
    return float(value)


def with_shift(scheduler: Any, shift: float) -> Any:  # noqa: ANN401 - of diffusers
    """Return a scheduler with a flow shift: itself if it has that value, else another one of its class and settings.

    Args:
        scheduler: of diffusers.
        shift: above 0.

    Raises:
        UserError: (MODEL) schedulers of this class have no flow shift.
    """
    key = next((key for key in SHIFT_KEYS if key in scheduler.config), None)
    if key is None:
        what = f"{type(scheduler).__name__} has no flow shift, so that it cannot sample with the one of the training"
        hint = "use the scheduler that the model was published with"
        raise UserError("model_index.json", what, hint, MODEL)
    if scheduler.config[key] == shift:
        return scheduler
    return type(scheduler).from_config(scheduler.config, **{key: shift})
