"""Tests of videox.training.memory_advice: every phase that can run out of memory has an advice."""

from __future__ import annotations

import ast
from pathlib import Path

from videox.encoders import encode
from videox.training.memory_advice import NOT_ESTIMATED, PHASES

ROOT = Path(__file__).resolve().parents[2]
# Loading, saves and exports: no figure of the estimate is theirs alone, and the advice says so.
WITHOUT_ESTIMATE = {"loading the model", "loading the checkpoint", "a save", "the export"}


def phases_of_the_code() -> set[str]:
    """Return the names in the calls of memory_phase, and those of the encoders, which are put together."""
    names = {f"the {name}" for name in encode.ENCODER_NAMES.values()}
    for path in (ROOT / "videox").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "memory_phase":
                (argument,) = node.args
                if isinstance(argument, ast.Constant):
                    names.add(argument.value)
    return names


def test_every_phase_is_estimated_or_known_not_to_be() -> None:
    named = phases_of_the_code()
    assert len(named) >= 10
    encoders = {"the text encoder", "the image encoder"}  # named by the encoded tensors' modules
    assert named | encoders == {*PHASES, *NOT_ESTIMATED, *WITHOUT_ESTIMATE}
    assert not {*PHASES} & {*NOT_ESTIMATED, *WITHOUT_ESTIMATE}
