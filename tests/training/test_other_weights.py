"""Tests of videox.training.other_weights: the expert that is not trained is loaded for samples where it fits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from videox.models.configured import Component
from videox.training import other_weights


@pytest.fixture(scope="module")
def component(tmp_path_factory: pytest.TempPathFactory) -> Component:
    folder = tiny.build_wan22_t2v(tmp_path_factory.mktemp("model") / "wan") / "transformer_2"
    return Component(folder, {})


class Other:
    """What loads the other expert; counts how often all processes load it together."""

    def __init__(self) -> None:
        self.together = 0

    def load(self, gather: Any) -> None:
        assert gather(1) == [1]
        self.together += 1


def prepare(component: Component, *, prompts: list[str], sharded: bool) -> tuple[str, int]:
    args = SimpleNamespace(validation_prompts=prompts, validation_paths=[], train_mode="normal")
    context = SimpleNamespace(
        accelerator=SimpleNamespace(mixed_precision="bf16"), gather=lambda value: [value],
        backend=SimpleNamespace(full_weights=not sharded),
    )  # fmt: skip
    other = Other()
    return other_weights.prepare(args, context, component, other), other.together


def test_it_is_loaded_on_all_processes_where_they_sample_together(component: Component) -> None:
    assert prepare(component, prompts=["a cat"], sharded=True) == ("", 1)
    assert prepare(component, prompts=["a cat"], sharded=False) == ("", 0)  # the main process loads it when it samples
    assert prepare(component, prompts=[], sharded=True) == ("", 0)


def test_without_room_in_host_memory_there_are_no_samples(
    component: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = Path(component.path).glob("*.safetensors")
    numbers = path.stat().st_size // 4  # about; the header is small
    monkeypatch.setattr(other_weights, "free_host_memory", lambda: numbers)  # half of what bf16 needs
    reason, loaded = prepare(component, prompts=["a cat"], sharded=True)
    assert "the other expert needs 0.0 GB of host memory, 0.0 GB are free" in reason and not loaded
    monkeypatch.setattr(other_weights, "free_host_memory", lambda: 2 * numbers)
    assert prepare(component, prompts=["a cat"], sharded=True) == ("", 1)


def test_the_free_memory_of_this_machine_is_read() -> None:
    assert 2**20 < other_weights.free_host_memory() < 2**50
