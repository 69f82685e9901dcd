"""Serves whoever follows a run in TensorBoard or Weights & Biases, without which a run goes on as well."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from videox.errors import UserError
from videox.tracking.metrics import StepRecord

logger = logging.getLogger(__name__)


class _Sink(Protocol):
    errors: tuple[type[Exception], ...]

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, logging_dir: Path, project: str, settings: Mapping[str, object], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a run that was rewound had logged after this step
        self._writer = SummaryWriter(str(logging_dir / project), purge_step=first_step, flush_secs=30)
        self._writer.add_text("settings", "    " + json.dumps(settings, indent=1, default=str).replace("\n", "\n    "))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    errors: tuple[type[Exception], ...]

    def __init__(self, logging_dir: Path, project: str, settings: Mapping[str, object], first_step: int) -> None:
        import wandb

        del first_step  # there each start is a run of its own
        self.errors = (OSError, wandb.errors.Error)
        logging_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(dir=str(logging_dir), project=project, config=dict(settings))
        except wandb.errors.Error as error:  # not logged in, no network
            raise OSError(str(error)) from error

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, object], int], _Sink] | None] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "none": None,
}


def check_tracker(report_to: str) -> None:
    """Raises a UserError (exit code 2) for a tracker that is unknown or not installed; cheap, for every process."""
    if report_to not in TRACKERS:
        raise UserError("--report_to", f"there is no tracker {report_to!r}", f"choose one of {', '.join(TRACKERS)}")
    if TRACKERS[report_to] is not None and importlib.util.find_spec(report_to) is None:
        hint = f"pip install {report_to}, or give --report_to none"
        raise UserError("--report_to", f"{report_to} is not installed", hint)


class Tracker:
    """Sends scalars to TensorBoard or Weights & Biases. One that fails is a warning; training goes on without it.

    Args:
        report_to: a key of TRACKERS.
        logging_dir: folder for its files.
        project: name of the project (TensorBoard: a sub-folder).
        settings: what was asked and resolved, shown beside the curves.
        first_step: the first optimizer step that this process will do (from 1).
        enabled: False on every process but the main one; then nothing is opened.

    Raises:
        UserError: (exit code 2) as `check_tracker`.
    """

    def __init__(
        self,
        report_to: str,
        logging_dir: Path,
        *,
        project: str,
        settings: Mapping[str, object],
        first_step: int = 1,
        enabled: bool = True,
    ) -> None:
        check_tracker(report_to)
        self.name = report_to
        self._sink: _Sink | None = None
        build = TRACKERS[report_to]
        if build is None or not enabled:
            return
        try:
            self._sink = build(logging_dir, project, settings, first_step)
        except OSError as error:
            self._give_up(error)

    def log(self, record: StepRecord) -> None:
        """Sends the scalars of one optimizer step."""
        self.scalars(
            {
                "train/loss": record.loss,
                "train/lr": record.lr,
                "train/grad_norm": record.grad_norm,
                "speed/tokens": float(record.tokens),
                "speed/tokens_per_second": record.tokens_per_second,
                "speed/data_wait": record.data_wait,
                **{f"speed/{name}": value for name, value in record.measured.items()},
            },
            record.step,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Sends named scalars of one optimizer step."""
        if self._sink is not None:
            try:
                self._sink.write(values, step)
            except self._sink.errors as error:
                self._give_up(error)

    def close(self) -> None:
        """Waits until everything is written, and closes."""
        if self._sink is not None:
            try:
                self._sink.close()
            except self._sink.errors as error:
                self._give_up(error)
            self._sink = None

    def _give_up(self, error: Exception) -> None:
        logger.warning("tracker %s failed and is off from now on (%s); metrics.jsonl goes on", self.name, error)
        self._sink = None
