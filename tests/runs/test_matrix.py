"""Serves whoever chooses a launch recipe: each family trains, resumes and converts under each, as the table says."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from test_backends import BUILD, Ground

backends = tiny.load_script("benchmarks/backends.py")


@pytest.fixture(scope="module", params=BUILD)
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return backends.ground_of(request.param, tmp_path_factory.mktemp("ground"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", backends.RECIPES)
def test_every_family_and_task_under_every_recipe(ground: Ground, tmp_path: Path, recipe: str) -> None:
    found = backends.run_cell(ground, recipe, tmp_path / "run")
    assert found.wrong == {}
    assert found.loss_distance <= 0.02
    assert found.cosine >= 0.99
    clips = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.mp4"))
    sampled = ["step-000000-prompt-0.mp4", "step-000010-prompt-0.mp4"] if ground.mode == "normal" else []
    assert clips[:2] == sampled
