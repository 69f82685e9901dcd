"""Tests of videox.models.scheduler: the flow shift of real diffusers schedulers is read and set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from videox.errors import MODEL, UserError
from videox.models.scheduler import CONFIG, scheduler_shift, with_shift

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = [
    UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0, solver_order=3),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_a_scheduler_with_another_shift_samples_as_one_that_was_made_with_it(scheduler: Any, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert scheduler_shift(config, tmp_path) == 3.0
    assert with_shift(scheduler, 3.0) is scheduler
    key = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    made = type(scheduler)(**{name: value for name, value in scheduler.config.items() if name[0] != "_"} | {key: 7.0})
    shifted = with_shift(scheduler, 7.0)
    assert scheduler_shift(shifted.config, tmp_path) == 7.0 and scheduler.config[key] == 3.0
    for each in (scheduler, made, shifted):
        each.set_timesteps(8)
    assert torch.equal(shifted.sigmas, made.sigmas) and not torch.allclose(shifted.sigmas, scheduler.sigmas, atol=0.05)
    others = {name: value for name, value in shifted.config.items() if name != key and name[0] != "_"}
    assert others == {name: value for name, value in made.config.items() if name in others}


def test_a_scheduler_without_a_flow_shift_is_refused() -> None:
    with pytest.raises(UserError, match="DDIMScheduler has no flow shift") as raised:
        with_shift(DDIMScheduler(), 3.0)
    assert raised.value.exit_code == MODEL


def test_a_configuration_may_have_no_shift() -> None:
    assert scheduler_shift({"_class_name": "UniPCMultistepScheduler"}, Path("scheduler")) is None
    assert scheduler_shift({"flow_shift": None, "shift": 5}, Path("scheduler")) == 5.0


@pytest.mark.parametrize("value", [0, -3.0, 1000.0, float("nan"), float("inf"), True, "3.0", [3.0]])
def test_a_shift_that_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="not a number above 0") as raised:
        scheduler_shift({"shift": value}, Path("model/scheduler"))
    assert raised.value.where == f"model/scheduler/{CONFIG}" and "--flow_shift" in raised.value.hint
