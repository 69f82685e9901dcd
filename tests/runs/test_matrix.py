"""Tests of every family under every launch recipe: it trains, resumes and converts, see benchmarks/backends.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from launches import MODEL_BUILDERS, BackendRuns

backends = tiny.load_script("benchmarks/backends.py")


@pytest.fixture(scope="module", params=MODEL_BUILDERS)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return backends.train_baseline(request.param, tmp_path_factory.mktemp("setup"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", backends.RECIPES)
def test_every_family_and_mode_trains_under_every_recipe(setup: BackendRuns, tmp_path: Path, recipe: str) -> None:
    result = backends.run_cell(setup, recipe, tmp_path / "run")
    assert result.wrong == {}
    assert result.loss_distance <= 0.02
    assert result.cosine >= 0.99
    clips = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.mp4"))
    expected = ["step-000000-prompt-0.mp4", "step-000010-prompt-0.mp4"] if setup.mode == "normal" else []
    assert clips[:2] == expected
