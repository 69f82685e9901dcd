"""The advice of a dry run is true: its flags are added to the command, and that run fits the card; and its answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

advice = tiny.load_script("benchmarks/advice.py")
questions = tiny.load_script("benchmarks/questions.py")
FAST_QUESTION = "bghira/SimpleTuner#657"
# Another trainer ran out of memory there. The dry run of this one computes that it fits, and that this is not sure.
TOO_CLOSE = "kohya-ss/musubi-tuner#723"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(advice.PAIRS)), ids=[f"{m}, {card}" for m, card, _ in advice.PAIRS])
def test_a_run_with_the_proposed_flags_fits(number: int, tmp_path: Path) -> None:
    row = advice.check(number, tmp_path)
    assert not row.wrong and row.proposals


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(q, id=f"{number} {q.thread}", marks=[] if q.thread == FAST_QUESTION else pytest.mark.slow)
        for number, q in enumerate(questions.QUESTIONS, 1)
    ],
)
def test_a_question_of_a_thread_is_answered(question: object, tmp_path: Path) -> None:
    answer = questions.ask(question, tmp_path)
    if question.thread == TOO_CLOSE:
        assert not answer.right and "too close to be sure" in answer.output
    else:
        assert answer.right, answer.output
