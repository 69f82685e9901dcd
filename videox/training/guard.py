"""StepGuard: counts skipped steps and unreadable rows in the train state, and ends a run that has too many of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from videox.data.dataset import BadSample
from videox.engine.train_state import TrainState
from videox.errors import DATA, NUMERICS, UserError
from videox.tracking.jsonl import append_line
from videox.training.context import Context
from videox.training.spikes import SpikeDetector

ALWAYS_ALLOWED_BAD = 10  # rows that may be unreadable whatever the fraction
SKIPS_ALLOWED = 5  # consecutive steps without an update
ROWS_SHOWN = 64


class StepOutcome(NamedTuple):
    """What the device found for a step that is done.

    Attributes:
        step: optimizer step, from 1.
        rows: metadata rows of its samples.
        empty: none of its samples could be read.
        applied: the weights were updated.
        loss: of the step, over all ranks.
        grad_norm: before clipping.
    """

    step: int
    rows: Sequence[int]
    empty: bool
    applied: bool
    loss: float
    grad_norm: float


class StepGuard:
    """Limits on skipped steps and unreadable rows.

    Args:
        ctx: of the run.
        state: whose counters are kept.
        max_bad_fraction: share of the rows, 0 to 1, that may be unreadable; ten rows are always allowed.
        note: prints a line on the main process.
        skip_spikes: steps with a spike are left out.

    Attributes:
        spikes: compares each step with those before it.
    """

    def __init__(
        self,
        ctx: Context,
        state: TrainState,
        max_bad_fraction: float,
        note: Callable[[str], None],
        *,
        skip_spikes: bool = False,
    ) -> None:
        self.ctx, self.state, self.max_bad_fraction, self.note = ctx, state, max_bad_fraction, note
        self.spikes = SpikeDetector(state, skip=skip_spikes)

    def count(self, outcome: StepOutcome) -> None:
        """Count a step that is recorded.

        Raises:
            UserError: (NUMERICS) too many steps in a row had no update.
        """
        state = self.state
        if outcome.empty:
            state.skipped += 1  # limited by max_bad_fraction; says nothing about the numerics of the run
            return
        if math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm):
            state.skipped_in_row = 0
            state.skipped += not outcome.applied  # a spike, under --skip_spikes
            if said := self.spikes.add(outcome.loss, outcome.grad_norm):
                what = "is a spike" if outcome.applied else "is left out (--skip_spikes)"
                self.note(f"step {outcome.step} {what}: {said}; its rows are {_some_rows(outcome.rows)}")
            return
        state.skipped += 1
        state.skipped_in_row += 1
        self.note(f"step {outcome.step} was skipped: its loss or gradient is not finite")
        if state.skipped_in_row >= SKIPS_ALLOWED:
            what = (
                f"{state.skipped_in_row} steps in a row had no finite loss and gradient, the last one with rows "
                f"{list(outcome.rows)}"
            )
            hint = "resume from an earlier checkpoint with a lower --learning_rate, or check these rows"
            raise UserError(f"step {outcome.step}", what, hint, NUMERICS)

    def record_bad_samples(self, local: Sequence[BadSample], rows: int) -> None:
        """Write the unreadable samples of all ranks to bad_samples.jsonl; all ranks call it.

        Args:
            local: unreadable samples of this rank in the current step.
            rows: number of rows of the metadata.

        Raises:
            UserError: (DATA) more rows than allowed are unreadable.
        """
        state = self.state
        gathered = [(rank, bad) for rank, part in enumerate(self.ctx.gather(list(local))) for bad in part]
        for rank, bad in gathered:
            state.bad = sorted({*state.bad, bad.row})
            if self.ctx.is_main:
                line = {"row": bad.row, "path": bad.path, "class": bad.media_class, "detail": bad.detail}
                path = self.ctx.output_dir / "bad_samples.jsonl"
                append_line(path, {**line, "step": state.step + 1, "rank": rank})
            self.note(f"row {bad.row} is skipped (weight 0): {bad.path!r} is {bad.media_class} ({bad.detail})")
        known = len({*state.bad, *state.quarantined})
        if known > max(ALWAYS_ALLOWED_BAD, self.max_bad_fraction * rows):
            hint = "fix the files named in bad_samples.jsonl, or raise --max_bad_fraction"
            raise UserError("--max_bad_fraction", f"{known} of {rows} rows are unreadable", hint, DATA)


def _some_rows(rows: Sequence[int]) -> str:
    """Return the rows of a step for a message; of a large step the first ones."""
    more = f" and {len(rows) - ROWS_SHOWN} more (all are in metrics.jsonl)" if len(rows) > ROWS_SHOWN else ""
    return f"{list(rows[:ROWS_SHOWN])}{more}"
