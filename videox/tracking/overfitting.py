"""What a series of validations says: whether the model learns, whether it overfits, and which step was the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from videox.tracking.jsonl import read_lines

# How far above its minimum, as a share of it, the held-out loss must be to count as risen: changes of the weights
# that are too small to matter move it by less.
RISEN = 0.005
SURE = 2  # validations in a row after the best one that must show it


@dataclass(frozen=True)
class Measured:
    """One validation.

    Attributes:
        step: optimizer steps done.
        held_out: loss on the held-out rows; None or not finite where there is none.
        trained: loss on training rows at the same noise; None where it was not measured.
    """

    step: int
    held_out: float | None
    trained: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the held-out loss is a number."""
        return self.held_out is not None and math.isfinite(self.held_out)


def read_history(path: Path) -> list[Measured]:
    """Return the validations of validation.jsonl, in order; [] if there is no file.

    Raises:
        UserError: (exit code 5) a line is not a JSON object.
    """
    return [Measured(line["step"], line.get("loss"), line.get("train_loss")) for line in read_lines(path)]


def best_of(history: Sequence[Measured]) -> Measured | None:
    """Return the first validation with the lowest held-out loss; None without a finite one."""
    return min((each for each in history if each.is_finite), key=_held_out, default=None)


def _held_out(measured: Measured) -> float:
    assert measured.held_out is not None
    return measured.held_out


def waited(history: Sequence[Measured]) -> int:
    """Return the number of validations since the one with the lowest held-out loss; 0 if the last one has it."""
    best = best_of(history)
    return 0 if best is None else len(history) - 1 - list(history).index(best)


def last_is_best(history: Sequence[Measured]) -> bool:
    """Whether the last validation has the lowest held-out loss."""
    return bool(history) and best_of(history) is history[-1]


def overfits(history: Sequence[Measured]) -> bool:
    """Whether the held-out loss has risen from its minimum while the loss on training rows went on falling.

    Each of the last SURE validations must show both, so that a single unlucky one does not count.
    """
    best = best_of(history)
    if best is None or waited(history) < SURE or best.trained is None:
        return False
    limit = _held_out(best) * (1 + RISEN)
    return all(
        each.is_finite and _held_out(each) > limit and each.trained is not None and each.trained < best.trained
        for each in history[-SURE:]
    )


def sentence(history: Sequence[Measured]) -> str:
    """Return what the last validation says, in words, without its held-out loss; "" if it says nothing.

    For example "training rows 0.6100; best at step 400: 0.7900; overfitting since step 400".
    """
    last, best = history[-1], best_of(history)
    parts = [f"training rows {last.trained:.4f}"] if last.trained is not None else []
    if best is None or len(history) < 2:
        return "; ".join(parts)
    if best is last:
        return "; ".join([*parts, "the lowest so far"])
    parts.append(f"best at step {best.step}: {_held_out(best):.4f}")
    since = "overfitting" if overfits(history) else "no new minimum"
    return "; ".join([*parts, f"{since} since step {best.step}"])
