"""Tests of videox.tracking.trackers: TensorBoard contains what was logged, a failing tracker does not end the run."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from records import record, run_python
from skips import skip_missing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from videox.errors import FLAGS, UserError
from videox.tracking.preview import write_clip
from videox.tracking.trackers import TRACKERS, Tracker, check_tracker


def test_tensorboard_contains_the_logged_values(tmp_path):
    tracker = Tracker("tensorboard", tmp_path, project="videox", settings={"lr": 2e-5, "path": Path("x")})
    for step in (1, 2, 3):
        tracker.log(record(step, loss=1 / step))
    tracker.scalars({"validation/loss": 0.25}, 3)
    tracker.close()
    tracker.log(record(4))  # after close, nothing is written
    events = EventAccumulator(str(tmp_path / "videox"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [(e.step, e.value) for e in losses] == [(s, pytest.approx(1 / s, rel=1e-6)) for s in (1, 2, 3)]
    assert events.Scalars("validation/loss")[0].value == 0.25
    assert {"train/lr", "train/grad_norm", "speed/tokens_per_second", "speed/data_wait"} <= set(
        events.Tags()["scalars"]
    )


def test_tensorboard_shows_the_corrected_loss_and_the_curves_before_a_branch(tmp_path):
    (tmp_path / "before").mkdir()
    earlier = [{**record(step, loss_corrected=0.1 * step).as_dict(), "loss": 2.0} for step in (1, 2)]
    for name, lines in (
        ("metrics.jsonl", earlier),
        ("validation.jsonl", [{"step": 2, "loss": 0.5, "train_loss": None}]),
    ):
        (tmp_path / "before" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    tracker = Tracker("tensorboard", tmp_path / "logs", project="videox", settings={}, first_step=3)
    tracker.earlier(tmp_path)
    tracker.log(record(3, loss_corrected=0.25))
    tracker.close()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(3).as_dict()) + "\n")
    time.sleep(1.1)
    again = Tracker("tensorboard", tmp_path / "logs", project="videox", settings={}, first_step=4)
    again.earlier(tmp_path)  # a resume: TensorBoard has these curves
    again.close()
    events = EventAccumulator(str(tmp_path / "logs/videox"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 2.0), (3, 0.5)]
    assert [e.value for e in events.Scalars("train/loss_corrected")] == pytest.approx([0.1, 0.2, 0.25])
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(2, 0.5)]
    assert "validation/train_loss" not in events.Tags()["scalars"]


def test_a_resumed_tracker_hides_the_steps_after_the_checkpoint(tmp_path):
    for first, last in ((1, 6), (4, 5)):
        tracker = Tracker("tensorboard", tmp_path, project="videox", settings={}, first_step=first)
        for step in range(first, last + 1):
            tracker.log(record(step, loss=float(first)))
        tracker.close()
        time.sleep(1.1)  # file names, and so their order, have a resolution of one second
    events = EventAccumulator(str(tmp_path / "videox"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4)]


def test_a_tracker_without_a_folder_warns_once_and_training_continues(tmp_path, caplog):
    (tmp_path / "logs").write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("tensorboard", tmp_path / "logs", project="videox", settings={})
        for step in range(1, 50):
            tracker.log(record(step))
        tracker.close()
    assert [r.name for r in caplog.records] == ["videox.tracking.trackers"] and "is now turned off" in caplog.text


def test_a_tracker_on_a_full_disk_warns_once_and_training_continues(tmp_path):
    code = (
        "import resource, sys, pathlib, time; sys.path.insert(0, 'tests/support')\n"
        "from records import record; from videox.tracking.trackers import Tracker\n"
        "tracker = Tracker('tensorboard', pathlib.Path(sys.argv[1]), project='p', settings={})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "for step in range(1, 3001): tracker.log(record(step))\n"
        "tracker.close(); print('trained', step)"
    )
    done = run_python(code, tmp_path)
    assert done.stdout == "trained 3000\n", done.stderr
    assert done.returncode == 0 and done.stderr.count("is now turned off") == 1


def test_tensorboard_plays_clips(tmp_path):
    tracker = Tracker("tensorboard", tmp_path, project="p", settings={})
    frames = np.zeros((33, 48, 640, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(33)[:, None, None] * 7
    for step in (0, 20):
        tracker.clip("samples/prompt-0", tmp_path / "clip.mp4", frames, 24.0, step)
    tracker.clip("samples/prompt-1", tmp_path / "still.png", frames[:1], 24.0, 20)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "p"))
    events.Reload()
    first, second = events.Images("samples/prompt-0")
    assert (first.step, second.step) == (0, 20) and first.encoded_image_string == second.encoded_image_string
    clip = Image.open(io.BytesIO(first.encoded_image_string))
    assert (clip.format, clip.size, clip.info["duration"], clip.info["loop"]) == ("GIF", (256, 19), 80, 0)
    assert clip.n_frames == 17  # every second one, at 12.5 frames per second
    reds = []
    for frame in range(17):
        clip.seek(frame)
        reds.append(np.asarray(clip.convert("RGB"))[5, 5, 0])
    assert np.abs(np.array(reds, int) - 14 * np.arange(17)).max() <= 3
    (still,) = events.Images("samples/prompt-1")
    assert (still.width, still.height) == (256, 19)
    assert Image.open(io.BytesIO(still.encoded_image_string)).n_frames == 1


@pytest.mark.slow
def test_wandb_gets_curves_clips_and_pictures(tmp_path, monkeypatch, caplog):
    """Without a network: W&B keeps the files for a later upload."""
    if importlib.util.find_spec("wandb") is None:
        skip_missing("`pip install wandb`", "W&B")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    frames = np.zeros((9, 48, 64, 3), np.uint8)
    clip = write_clip(tmp_path / "clip.mp4", frames, 8.0)
    still = write_clip(tmp_path / "still.mp4", frames[:1], 8.0)
    with caplog.at_level(logging.WARNING, "videox"):
        tracker = Tracker("wandb", tmp_path / "logs", project="p", settings={"learning_rate": 1e-4})
        for step in (1, 2):
            tracker.log(record(step))
            tracker.clip("samples/prompt-0", clip, frames, 8.0, step)
            tracker.clip("samples/prompt-1", still, frames[:1], 8.0, step)
        tracker.close()
    assert caplog.records == []
    media = [path for path in (tmp_path / "logs").rglob("media/**/*") if path.is_file()]
    assert sorted(path.suffix for path in media) == [".mp4", ".mp4", ".png", ".png"]
    assert all(path.read_bytes() == {".mp4": clip, ".png": still}[path.suffix].read_bytes() for path in media)
    assert [path.stat().st_size > 0 for path in (tmp_path / "logs").rglob("run-*.wandb")] == [True]


def test_unknown_and_missing_trackers_are_errors(monkeypatch):
    with pytest.raises(UserError, match=r"unknown tracker 'tensorbord'.*tensorboard, wandb, none") as raised:
        check_tracker("tensorbord")
    assert raised.value.exit_code == FLAGS
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(UserError, match=r"wandb is not installed.*pip install wandb"):
        check_tracker("wandb")
    check_tracker("none")
    assert list(TRACKERS) == ["tensorboard", "wandb", "none"]


def test_other_processes_than_the_main_one_track_nothing(tmp_path):
    Tracker("tensorboard", tmp_path / "logs", project="p", settings={}, enabled=False).log(record(1))
    assert list(tmp_path.iterdir()) == []
