"""Tests of real starts in left-over environments: each trains as one process, or ends with one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

environments = tiny.load_script("benchmarks/environments.py")
LIMIT = 600.0  # seconds, on a busy machine; what waited for an address or a process waited for an hour
FAST = ("WORLD_SIZE of a cluster",)  # refused before torch is imported; the others are checked as functions


def test_environments_have_names_of_their_own() -> None:
    names = [environment.name for environment in environments.ENVIRONMENTS]
    assert len(set(names)) == len(names)
    assert set(FAST) < set(names)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("environments")
    return tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data")


def check(environment: Any, model: Path, metadata: Path, folder: Path) -> None:
    result = environments.start(environment, model, metadata, folder, LIMIT)
    outcome = environments.outcome(environment, result)
    assert outcome == ("refused" if environment.expected else "trains"), f"{outcome}\n{result.output[-4000:]}"
    by_launcher = environment.command != environments.PYTHON
    assert by_launcher or not result.traceback


@pytest.mark.parametrize("name", FAST)
def test_a_start_is_refused_before_torch_is_imported(tmp_path: Path, name: str) -> None:
    environment = next(environment for environment in environments.ENVIRONMENTS if environment.name == name)
    check(environment, tmp_path / "model", tmp_path / "data" / "metadata.json", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("environment", environments.ENVIRONMENTS, ids=lambda environment: environment.name)
def test_a_start_trains_or_ends_with_one_line(environment: Any, data: tuple[Path, Path], tmp_path: Path) -> None:
    check(environment, *data, tmp_path)


def test_a_left_over_local_rank_trains_as_one_process(
    data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, metadata = data
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    changes = {"max_train_steps": 1, "video_sample_n_frames": 9, "image_sample_size": 64}
    outcome = runs.train(runs.wan_flags(model, metadata, metadata.parent / "run", **changes))
    assert outcome.code == 0, outcome.stderr
    assert "LOCAL_RANK MASTER_ADDR set, but this is one process: ignored" in outcome.stdout
    assert "backend     single" in outcome.stdout
    assert "torch" in sys.modules
