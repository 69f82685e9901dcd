"""Experiment trackers: TensorBoard and Weights & Biases. A tracker that fails never ends a run."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from videox.errors import UserError
from videox.run.branch import METRICS, VALIDATION, earlier_lines
from videox.tracking.jsonl import read_lines
from videox.tracking.metrics import StepRecord

GIF_SIDE, GIF_FPS = 256, 10.0  # longer side in pixels, and frames per second, of clips in TensorBoard

logger = logging.getLogger(__name__)


class _Backend(Protocol):
    errors: tuple[type[Exception], ...]
    continues: bool  # what earlier processes logged in the same folder is part of the curves

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def show(self, name: str, path: Path, frames: np.ndarray, fps: float, step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    errors: tuple[type[Exception], ...] = (OSError,)
    continues = True

    def __init__(self, logging_dir: Path, project: str, settings: Mapping[str, object], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # After a resume from an earlier checkpoint, purge_step hides what was logged after that checkpoint.
        self._writer = SummaryWriter(str(logging_dir / project), purge_step=first_step, flush_secs=30)
        self._writer.add_text("settings", "    " + json.dumps(settings, indent=1, default=str).replace("\n", "\n    "))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, name: str, path: Path, frames: np.ndarray, fps: float, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        del path
        # Not add_video, which needs moviepy for the same: TensorBoard plays a GIF in the panel of images.
        content, width, height = animated_gif(frames, fps)
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    errors: tuple[type[Exception], ...]
    continues = False

    def __init__(self, logging_dir: Path, project: str, settings: Mapping[str, object], first_step: int) -> None:
        import wandb

        del first_step  # in W&B every start is a separate run, so nothing has to be hidden
        self.errors = (OSError, wandb.errors.Error)
        logging_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(dir=str(logging_dir), project=project, config=dict(settings))
        except wandb.errors.Error as error:  # not logged in, no network
            raise OSError(str(error)) from error

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, name: str, path: Path, frames: np.ndarray, fps: float, step: int) -> None:
        import wandb

        del fps  # the file has it
        still = len(frames) == 1
        self._run.log({name: wandb.Image(str(path)) if still else wandb.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, object], int], _Backend] | None] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "none": None,
}


def animated_gif(frames: np.ndarray, fps: float) -> tuple[bytes, int, int]:
    """Return a clip as a small GIF that repeats, with its width and height in pixels.

    Frames are left out above GIF_FPS, because a GIF of a whole clip takes megabytes in the log at each step.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: frames per second, above 0.
    """
    every = max(1, round(fps / GIF_FPS))
    pictures = [ImageOps.contain(Image.fromarray(frame), (GIF_SIDE, GIF_SIDE)) for frame in frames[::every]]
    content = io.BytesIO()
    milliseconds = max(20, round(1000 * every / fps))  # browsers show shorter ones slowly
    first, *rest = pictures
    first.save(content, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return content.getvalue(), first.width, first.height


def check_tracker(report_to: str) -> None:
    """Raise a UserError (exit code 2) if a tracker is unknown or not installed. Cheap, so every rank calls it."""
    if report_to not in TRACKERS:
        raise UserError("--report_to", f"unknown tracker {report_to!r}", f"use one of {', '.join(TRACKERS)}")
    if TRACKERS[report_to] is not None and importlib.util.find_spec(report_to) is None:
        hint = f"run `pip install {report_to}`, or use --report_to none"
        raise UserError("--report_to", f"{report_to} is not installed", hint)


class Tracker:
    """Sends scalars to TensorBoard or Weights & Biases. A failure is logged as a warning and turns the tracker off.

    Args:
        report_to: a key of TRACKERS.
        logging_dir: folder for the tracker's files.
        project: name of the project (TensorBoard: name of the subfolder).
        settings: flags and resolved settings of the run, stored with the curves.
        first_step: number of the first optimizer step that this process will run (from 1).
        enabled: False on every process except the main one; nothing is opened then.

    Raises:
        UserError: (exit code 2) as raised by `check_tracker`.
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
        self._backend: _Backend | None = None
        build = TRACKERS[report_to]
        if build is None or not enabled:
            return
        try:
            self._backend = build(logging_dir, project, settings, first_step)
        except (OSError, ImportError) as error:  # ImportError: its packages do not fit together
            self._disable(error)

    def log(self, record: StepRecord) -> None:
        """Send the metrics of one optimizer step."""
        self.scalars(
            {
                "train/loss": record.loss,
                **({} if record.loss_corrected is None else {"train/loss_corrected": record.loss_corrected}),
                "train/lr": record.lr,
                "train/grad_norm": record.grad_norm,
                "speed/tokens": float(record.tokens),
                "speed/tokens_per_second": record.tokens_per_second,
                "speed/data_wait": record.data_wait,
                **{f"speed/{name}": value for name, value in record.measured.items()},
            },
            record.step,
        )

    def earlier(self, output_dir: Path) -> None:
        """Send the curves of the steps before this process that the tracker does not have.

        These are the ones before a branch, and in W&B, where every start is a separate run, all of them.

        Args:
            output_dir: of the run.
        """
        if self._backend is None:
            return
        has_own = (output_dir / METRICS).is_file() and bool(read_lines(output_dir / METRICS))
        if self._backend.continues and has_own:
            return
        tags = {name: f"train/{name}" for name in ("loss", "loss_corrected", "lr", "grad_norm")}
        measured = {name: f"validation/{name}" for name in ("loss", "train_loss", "ema_loss")}
        found: list[tuple[int, dict[str, float]]] = []
        for name, names in ((METRICS, tags), (VALIDATION, measured)):
            for record in map(json.loads, earlier_lines(output_dir / name)):
                values = {tag: record[key] for key, tag in names.items() if record.get(key) is not None}
                found.append((record["step"], values))
        for step, values in sorted(found, key=lambda pair: pair[0]):  # W&B refuses a step below the last one
            self.scalars(values, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send named scalars of one optimizer step."""
        if self._backend is not None:
            try:
                self._backend.write(values, step)
            except self._backend.errors as error:
                self._disable(error)

    def clip(self, name: str, path: Path, frames: np.ndarray, fps: float, step: int) -> None:
        """Send a clip or a picture of one optimizer step.

        Args:
            name: the same at each step, so that the tracker shows a series.
            path: of the written file, .mp4 or .png.
            frames: its frames, uint8 [T, H, W, 3].
            fps: frames per second.
            step: optimizer steps done.
        """
        if self._backend is not None:
            try:
                self._backend.show(name, path, frames, fps, step)
            except self._backend.errors as error:
                self._disable(error)

    def close(self) -> None:
        """Write everything that is buffered, and close the tracker."""
        if self._backend is not None:
            try:
                self._backend.close()
            except self._backend.errors as error:
                self._disable(error)
            self._backend = None

    def _disable(self, error: Exception) -> None:
        logger.warning(
            "tracker %s failed and is now turned off (%s); metrics.jsonl is still written", self.name, error
        )
        self._backend = None
