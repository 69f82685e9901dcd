"""Tests of videox.run.equal_processes: processes that were started differently are refused, with what differs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.run.test_lifecycle import run_ranks
from videox.errors import UserError
from videox.run import equal_processes
from videox.run.equal_processes import code_facts, refuse_differences

FACTS: dict[str, object] = {"--learning_rate": 1e-4, "--seed": 42, "--lora_rank": 0, "--optimizer": "adamw"}


def compare(*changes: dict[str, object]) -> list[object]:
    """Return what refuse_differences raises on each rank, None where nothing; changes: of the facts, by rank."""

    def enter(rank: int, gather: Callable[[object], list[object]]) -> None:
        refuse_differences({**FACTS, **changes[rank]}, "do the same", gather)

    return run_ranks(enter, len(changes))


def test_equal_processes_pass() -> None:
    assert compare({}, {}, {}) == [None] * 3
    assert code_facts() == code_facts() and len(code_facts()) == 2 + len(equal_processes.PACKAGES)


def test_every_rank_raises_the_first_difference_with_both_values() -> None:
    errors = compare({}, {}, {"--learning_rate": 2e-4}, {"--learning_rate": 3e-4})
    lines = {error.line() for error in errors if isinstance(error, UserError)}
    assert len(errors) == 4 and lines == {
        "error: --learning_rate: 0.0001 in process 0, 0.0002 in process 2. Fix: do the same."
    }


def test_three_differences_are_named_and_the_others_counted() -> None:
    (first, _) = compare(
        {}, {"--learning_rate": 1, "--seed": None, "--lora_rank": 8, "--optimizer": "x" * 99, "--new": 1}
    )
    assert isinstance(first, UserError) and first.where == "--learning_rate"
    assert first.what == (
        "0.0001 in process 0, 1 in process 1; --seed: 42 in process 0, not given in process 1; "
        "--lora_rank: 0 in process 0, 8 in process 1; 2 more"
    )


def test_machines_are_named_if_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter(("node-a", "node-b"))
    gathered = [("node-a", dict(FACTS)), ("node-b", {**FACTS, "--seed": 7})]
    monkeypatch.setattr(equal_processes.socket, "gethostname", lambda: next(hosts))
    with pytest.raises(UserError, match="42 in process 0 on node-a, 7 in process 1 on node-b"):
        refuse_differences(FACTS, "do the same", lambda _: gathered)
