"""Tests of videox.training.schedule and data: what a start plans and looks up, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

import videox.training.data
import videox.training.data_change
import videox.training.loop
import videox.training.schedule


def test_a_start_plans_each_epoch_once_and_looks_the_cache_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    results: dict[str, list[Any]] = {"plan_epoch": [], "find_missing": []}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            calls[name] += 1
            results[name].append(function(*arguments, **settings))
            return results[name][-1]

        return call

    for module in (videox.training.schedule, videox.training.data_change, videox.training.loop):
        monkeypatch.setattr(module, "plan_epoch", counted("plan_epoch", module.plan_epoch))
    monkeypatch.setattr(
        videox.training.data, "find_missing", counted("find_missing", videox.training.data.find_missing)
    )
    model, metadata = tiny.build_wan_t2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data")
    flags = {"num_train_epochs": 2, "latent_cache": tmp_path / "cache", "validation_rows": 1}
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "run", **flags))
    assert outcome.code == 0, outcome.stderr
    assert calls == {"plan_epoch": 2, "find_missing": 1}
    first, second = results["plan_epoch"]
    assert (first.first_step, second.first_step) == (0, first.n_steps)
