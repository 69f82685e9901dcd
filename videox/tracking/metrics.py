"""metrics.jsonl: one line for each optimizer step, with no step missing and none repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from videox.files import flush
from videox.tracking.jsonl import append_line, drop_truncated_line, read_lines


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step as it is stored in metrics.jsonl.

    Attributes:
        step: number of the optimizer step, from 1.
        loss: mean over the real (not padding) samples of the global batch.
        lr: learning rate of this step.
        grad_norm: global gradient norm before clipping.
        tokens: sequence length summed over the real samples of the global batch.
        tokens_per_second: `tokens` divided by the seconds of this step.
        data_wait: seconds waited for data, maximum over the ranks.
        rows: metadata row numbers of the global batch in schedule order.
        buckets: (frames, height, width) of each row, height and width in pixels.
        measured: additional metrics of the step by name, see videox.estimate.mfu.
        loss_corrected: `loss` without what follows from its noise levels and buckets, see
            videox.tracking.corrected_loss; None where it is not known.
        skipped: the weights were not updated although loss and gradient norm are finite: a spike under --skip_spikes,
            or a step none of whose samples could be read.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    data_wait: float
    rows: Sequence[int]
    buckets: Sequence[Sequence[int]]
    measured: Mapping[str, float] = field(default_factory=dict)
    loss_corrected: float | None = None
    skipped: bool = False

    def as_dict(self) -> dict[str, object]:
        """Return the JSON object for metrics.jsonl; numpy and torch numbers are converted to Python's."""
        if len(self.rows) != len(self.buckets):
            raise ValueError(f"{len(self.rows)} rows but {len(self.buckets)} buckets in step {self.step}")
        return {
            "step": int(self.step),
            "loss": float(self.loss),
            **({} if self.loss_corrected is None else {"loss_corrected": float(self.loss_corrected)}),
            "lr": float(self.lr),
            "grad_norm": float(self.grad_norm),
            "tokens": int(self.tokens),
            "tokens_per_second": float(self.tokens_per_second),
            "data_wait": float(self.data_wait),
            **{name: float(value) for name, value in self.measured.items()},
            **({"skipped": True} if self.skipped else {}),
            "rows": [int(row) for row in self.rows],
            "buckets": [[int(side) for side in bucket] for bucket in self.buckets],
        }


class MetricsLog:
    """Writer of output_dir/metrics.jsonl: one line per optimizer step, written to the file when `append` returns.

    Args:
        output_dir: the run folder.
        enabled: False on every process except the main one; nothing is written then.
        after: for a new file, the step before its first line; not 0 when a run resumes from another folder's
            checkpoint.

    Raises:
        UserError: (exit code 5) if the file contains a broken line or cannot be written.
    """

    def __init__(self, output_dir: Path, *, enabled: bool = True, after: int = 0) -> None:
        self.path, self.enabled = output_dir / "metrics.jsonl", enabled
        lines = read_lines(self.path) if enabled else []
        self.last_step = lines[-1]["step"] if lines else after
        if enabled:
            drop_truncated_line(self.path)

    def append(self, record: StepRecord) -> None:
        """Append the line of one step.

        Raises:
            ValueError: if the step does not directly follow the last line's step.
            UserError: (exit code 5) if the file cannot be written.
        """
        if record.step != self.last_step + 1 and self.enabled:
            raise ValueError(f"{self.path}: step {record.step} does not follow step {self.last_step}")
        if self.enabled:
            append_line(self.path, record.as_dict())
        self.last_step = record.step

    def sync(self) -> None:
        """Flush the lines to disk.

        Called before a checkpoint is published: after a power loss there must be no checkpoint without the lines of
        its steps.
        """
        if self.enabled and self.path.exists():
            flush(self.path)
