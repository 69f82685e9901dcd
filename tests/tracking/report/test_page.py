"""Tests of the page of a run: content, hostile texts, missing and damaged files, size, and how it is replaced."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from PIL import Image
from run_folders import HOSTILE, Parsed, metric_lines, write_lines, write_run

from videox.data.media.video import read_clip
from videox.run.status import _process_start
from videox.tracking.report.__main__ import main
from videox.tracking.report.assets import SCRIPT
from videox.tracking.report.collect import SampleFile, read_run
from videox.tracking.report.markup import escaped
from videox.tracking.report.media import (
    FOLDER,
    Cache,
    clip_name,
    deadline,
    save_strip,
    small_clip,
    strip_name,
    training_strip,
)
from videox.tracking.report.page import PAGE, render, write_page
from videox.tracking.report.pictures import chosen_steps, data_dir_of, shown_samples, training_clips

LIMIT = 10_000_000  # bytes of a page
EVENT_HANDLER = "on"  # attributes with this prefix run scripts


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its page; not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("run") / "my run <b>&")
    write_page(folder)
    return folder


def tabs_of(page: str) -> list[str]:
    return [str(attributes["id"]) for name, attributes in Parsed(page).elements if attributes.get("role") == "tab"]


def test_the_page_shows_everything_that_a_run_wrote(written: Path) -> None:
    page = (written / PAGE).read_text(encoding="utf-8")
    assert tabs_of(page) == ["overview", "samples", "curves", "speed", "data", "clips", "events", "settings"]
    text = "".join(Parsed(page).text)
    for part in (
        "stopped and saved", "60 of 120", "Training loss", "Loss at fixed noise", "held-out rows, EMA", "sigma 0.25",
        "Gradient norm", "Learning rate", "Tokens per second", "data wait", "peak reserved", "planned", "measured",
        "17 x 64 x 96", "held out for validation", "Held-out rows: 1", "Much cropped rows: 1", "Rows that are not trained: 3",
        "could not be read during training: 1", "resumed", "from checkpoint-30", "flag changed", "prompt 0", "step 20",
        "Nearest training clip", "row 4", "--learning_rate", "python train.py --x",
    ):  # fmt: skip
        assert part in text, part
    videos = [a for name, a in Parsed(page).elements if name == "video"]
    assert len(videos) == 4 and all(a["data-clip"] for a in videos)
    pictures = [a for name, a in Parsed(page).elements if name == "img"]
    assert len(pictures) == len(HOSTILE) + 2  # two nearest clips
    assert (written / FOLDER).is_dir() and not list(written.glob(".tmp-*"))


def test_the_page_loads_nothing_and_runs_its_own_script_alone(written: Path) -> None:
    page = (written / PAGE).read_text(encoding="utf-8")
    elements = Parsed(page).elements
    names = [name for name, _ in elements]
    assert names.count("script") == names.count("style") == names.count("title") == 1
    assert not {"iframe", "object", "embed", "link", "base", "form", "textarea"} & set(names)
    assert page.count(SCRIPT) == 1
    policy = next(a["content"] for name, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    for name, attributes in elements:
        assert not [key for key in attributes if key.startswith(EVENT_HANDLER)], (name, attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
        href = attributes.get("href")
        assert href is None or (written / href).is_file(), href  # the clips beside the page


def test_hostile_captions_paths_and_prompts_are_shown_as_texts(written: Path) -> None:
    page = (written / PAGE).read_text(encoding="utf-8")
    for text in HOSTILE:
        assert escaped(text) in page
        if "<" in text:
            assert text not in page.replace(SCRIPT, "")
    assert "\x00" not in page and "<b>" not in page[: page.index("</title>")]


FILES = ("args.json", "run_status.json", "metrics.jsonl", "validation.jsonl", "data_report.json", "refused_rows.jsonl",
         "bad_samples.jsonl", "events.jsonl", "samples", "checkpoint-30")  # fmt: skip


def copy_of(written: Path, folder: Path) -> Path:
    return Path(shutil.copytree(written, folder))


@pytest.mark.parametrize("left", [None, *FILES])
def test_every_file_may_be_missing(written: Path, tmp_path: Path, left: str | None) -> None:
    """Only one file is there, or none."""
    folder = tmp_path / "run"
    folder.mkdir()
    if left is not None:
        copy = shutil.copytree if (written / left).is_dir() else shutil.copy
        copy(written / left, folder / left)
    page = render(read_run(folder), Cache(folder / FOLDER, until=0.0))
    assert page.endswith("</html>\n") and tabs_of(page)[0] == "overview"
    assert ("curves" in tabs_of(page)) == (left in ("metrics.jsonl", "validation.jsonl"))
    assert ("settings" in tabs_of(page)) == (left == "args.json")
    assert not list(tmp_path.glob(f"run/{FOLDER}"))


WRONG_TYPES = b'{"step": "x", "rows": 3, "loss": [1]}\n{"step": 1, "loss": {}, "per_sigma": 4, "fates": [], "clips": 1}\n{"asked": 3}\n'


@pytest.mark.parametrize("name", FILES[:8])
@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe\nnull\n[1, 2]\n{}\n", WRONG_TYPES], ids=["cut", "bytes", "types"]
)
def test_damaged_files_are_left_out_and_named(written: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for file in ("args.json", "metrics.jsonl", "data_report.json"):
        shutil.copy(written / file, folder / file)
    (folder / name).write_bytes(content)
    run = read_run(folder)
    assert render(run, Cache(folder / FOLDER, until=0.0)).endswith("</html>\n")
    is_named = any(name in problem for problem in run.problems)
    if name != "run_status.json" and (content[:1] == b"\xff" or name in ("args.json", "data_report.json")):
        assert is_named, run.problems
    elif content == b"{":  # the last line may be being written
        assert not is_named


def test_a_line_that_is_being_written_is_no_problem(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", metric_lines(5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run = read_run(tmp_path)
    assert run.metrics.steps.tolist() == [1, 2, 3, 4, 5] and run.problems == []


def test_metrics_have_a_value_or_nan_in_every_step(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0, "rows": [3]}, {"step": 2, "loss": None, "non_finite": True, "rows": [3, 4]},
             {"step": 3, "loss": 1.0, "new_measure": 5}]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", lines)
    metrics = read_run(tmp_path).metrics
    assert metrics.columns["loss"].tolist()[::2] == [2.0, 1.0] and np.isnan(metrics.columns["loss"][1])
    assert np.isnan(metrics.columns["new_measure"][:2]).all() and metrics.columns["new_measure"][2] == 5
    assert metrics.not_finite == [2] and metrics.trained == {3: 2, 4: 1}
    page = render(read_run(tmp_path), Cache(tmp_path / FOLDER, until=0.0))
    assert "new measure" in page and "loss or gradient was not finite" in page


def test_what_the_validations_say_and_the_best_weights_are_on_the_page(tmp_path: Path) -> None:
    losses = [(0, 1.0, 1.0), (100, 0.8, 0.75), (200, 0.82, 0.7), (300, 0.85, 0.6)]
    lines = [{"step": step, "loss": held_out, "train_loss": trained} for step, held_out, trained in losses]
    write_lines(tmp_path / "validation.jsonl", lines)
    (tmp_path / "best-100").mkdir()
    text = "".join(Parsed(render(read_run(tmp_path), Cache(tmp_path / FOLDER, until=0.0))).text)
    words = "training rows 0.6000; best at step 100: 0.8000; overfitting since step 100"
    assert f"Held-out loss at step 300: 0.8500; {words}" in text
    write_lines(tmp_path / "validation.jsonl", [{"step": 0, "loss": None}])
    page = render(read_run(tmp_path), Cache(tmp_path / FOLDER, until=0.0))
    assert "Held-out loss at step 0: not finite<" in page
    assert "best-100" in text and "the weights of the lowest held-out loss" in text and "training rows" in text


def test_skipped_steps_and_an_early_stop_are_events(tmp_path: Path) -> None:
    lines = metric_lines(4)
    lines[2] |= {"skipped": True}
    write_lines(tmp_path / "metrics.jsonl", lines)
    write_lines(
        tmp_path / "events.jsonl", [{"event": "early_stop", "step": 4, "time": 1.8e9, "text": "no new minimum"}]
    )
    page = render(read_run(tmp_path), Cache(tmp_path / FOLDER, until=0.0))
    text = "".join(Parsed(page).text)
    assert "the weights were not changed" in text and "early stop" in text and "no new minimum" in text
    assert read_run(tmp_path).metrics.skipped == [3]


@pytest.mark.parametrize("count", [0, 1, 2, 29, 30, 31, 1000])
def test_the_samples_on_the_page_stay_the_same_as_new_ones_come(tmp_path: Path, count: int) -> None:
    """Of many steps an even part is taken, so that most of the reduced copies are of use again later."""

    def shown(steps: int) -> list[int]:
        samples = [SampleFile(10 * i, n, Path(f"{i}-{n}.mp4"), "", None, "") for i in range(steps) for n in (0, 1)]
        return sorted({sample.step for sample in shown_samples(replace(run, samples=samples))})

    run = read_run(tmp_path)
    steps = shown(count)
    assert len(steps) == count if count <= 30 else 15 <= len(steps) <= 30
    assert not count or (steps[0], steps[-1]) == (0, 10 * (count - 1))
    gone = {*steps} - {*shown(count + 1)}
    assert len(gone) <= 1 or count == 30  # the last one; at 30 every second one is left out


def test_links_to_many_clips_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step in range(200):
        (tmp_path / "samples" / f"step-{step:06d}-prompt-0.mp4").touch()
    page = render(read_run(tmp_path), Cache(tmp_path / FOLDER, until=0.0))
    assert page.count("<a href") == 60 and "and 140 earlier ones in samples/" in page and "step 199" in page


def test_the_corrected_loss_and_the_curves_before_a_branch_are_shown(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    write_lines(tmp_path / "before/metrics.jsonl", metric_lines(4))
    write_lines(tmp_path / "metrics.jsonl", [{**line, "loss_corrected": 0.5} for line in metric_lines(6)[4:]])
    write_lines(tmp_path / "before/validation.jsonl", [{"step": 0, "loss": 1.0}])
    run = read_run(tmp_path)
    assert run.metrics.steps.tolist() == [1, 2, 3, 4, 5, 6] and [line["step"] for line in run.validation] == [0]
    assert np.isnan(run.metrics.column("loss_corrected")).tolist() == [True] * 4 + [False] * 2
    page = render(run, Cache(tmp_path / FOLDER, until=0.0))
    assert "corrected, smoothed" in page and "loss corrected" not in page  # no chart of its own


def test_unknown_losses_of_a_validation_are_drawn(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0, "training_rows_loss": 0.5} for step in (0, 10)]
    write_lines(tmp_path / "validation.jsonl", lines)
    assert "training rows loss" in render(read_run(tmp_path), Cache(tmp_path / FOLDER, until=0.0))


def test_sample_records_name_prompts_and_settings(tmp_path: Path) -> None:
    for step in (0, 10):
        tiny.write_clip(tmp_path / "samples" / f"step-{step:06d}-prompt-0.mp4", 5, 64, 48)
    picture = tiny.write_image(tmp_path / "given.png", 400, 300)
    record = {"number": 0, "prompt": "a <fox>", "seed": 7, "steps": 25, "image": str(picture)}
    write_lines(
        tmp_path / "samples.jsonl",
        [{**record, "step": 10, "file": "samples/step-000010-prompt-0.mp4"},
         {**record, "step": 99, "file": "samples/none.mp4"}, {**record, "step": 5, "file": "../out.mp4"}],
    )  # fmt: skip
    (sample,) = read_run(tmp_path).samples
    assert (sample.step, sample.prompt, sample.settings) == (10, "a <fox>", "steps 25, seed 7")
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert "given picture" in page and "a &lt;fox&gt;" in page and page.count("data:image/webp") == 1


def test_a_page_of_ten_thousand_steps_and_a_thousand_refused_rows_is_small(tmp_path: Path) -> None:
    texts = [HOSTILE[i % len(HOSTILE)] * 5 for i in range(4)]
    folder = write_run(tmp_path / "run", steps=10_000, refused=1000, texts=texts, sample_steps=())
    # as many pictures and clips as a run may show, as large as they become: noise cannot be compressed
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    report["clips"] = [{**report["clips"][i % 4], "row": i, "path": f"{i}.mp4"} for i in range(600)]
    (folder / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    for step in range(0, 10_000, 250):
        for number in range(3):
            (folder / "samples").mkdir(exist_ok=True)
            (folder / "samples" / f"step-{step:06d}-prompt-{number}.mp4").write_bytes(b"x" * (step + number + 1))
    clip = tiny.write_clip(tmp_path / "clip.mp4", 9, 96, 64).read_bytes()
    size = 200_000  # bytes: a box of free space follows the clip
    content = clip + (size - len(clip)).to_bytes(4, "big") + b"free" + bytes(size - len(clip) - 8)
    run = read_run(folder)
    (folder / FOLDER).mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (3, 72, 128, 3), dtype=np.uint8)
    save_strip(tmp_path / "noise.webp", frames)
    for clip in training_clips(run):
        shutil.copy(tmp_path / "noise.webp", folder / FOLDER / strip_name(clip))
    for sample in run.samples:
        (folder / FOLDER / clip_name(sample)).write_bytes(content)
    page = render(run, Cache(folder / FOLDER, until=0.0), seconds_left=5.0)
    assert 4_000_000 < len(page.encode()) < LIMIT
    text = "".join(Parsed(page).text)
    assert "evenly spaced" in text and "not embedded" in text and "Rows that are not trained: 1,000" in text


@pytest.mark.parametrize("most", [1, 2, 5, 100])
@pytest.mark.parametrize("limit", [5, 10, 35, 1000])
def test_as_many_steps_as_fit_are_shown(most: int, limit: int) -> None:
    sizes = {step: 10 for step in range(0, 200, 20)}
    steps = chosen_steps(sizes, limit, most)
    assert len(steps) == min(most, limit // 10, 10) and steps == sorted(steps)
    assert not steps or steps[-1] == 180  # the newest
    assert len(steps) < 2 or steps[0] == 0


def test_a_reader_always_finds_a_whole_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", sample_steps=(), texts=HOSTILE[:3])
    write_page(folder)
    stop, broken = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            content = (folder / PAGE).read_text(encoding="utf-8")
            if not content.startswith("<!doctype html>") or not content.endswith("</html>\n"):
                broken.append(len(content))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(10):
        write_lines(folder / "metrics.jsonl", metric_lines(60 + 50 * step))
        write_page(folder)
    stop.set()
    reader.join()
    assert broken == [] and not list(folder.glob(".tmp-*"))


def test_time_left_is_the_runs_own_or_follows_the_last_steps(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{**line, "step_seconds": 30.0} for line in metric_lines(10)])
    (tmp_path / "args.json").write_text('{"asked": {"a": 1}, "resolved": {"total_steps": 30}}', encoding="utf-8")
    status = {"state": "running", "exit_code": None, "step": 10, "error": "", "pid": os.getpid(),
              "host": socket.gethostname(), "started": _process_start(os.getpid()), "updated": 1.8e9}  # fmt: skip
    (tmp_path / "run_status.json").write_text(json.dumps(status), encoding="utf-8")
    cache = Cache(tmp_path / FOLDER, until=0.0)
    assert '<dd dir="auto">10 min</dd>' in render(read_run(tmp_path), cache)
    assert '<dd dir="auto">2 h 00 min</dd>' in render(read_run(tmp_path), cache, seconds_left=7200.0)


def test_a_run_that_was_killed_is_said_to_be(tmp_path: Path) -> None:
    status = {"state": "running", "exit_code": None, "step": 10, "error": "", "pid": 2**22 + 1,
              "host": socket.gethostname(), "started": "1", "updated": 1.8e9}  # fmt: skip
    (tmp_path / "run_status.json").write_text(json.dumps(status), encoding="utf-8")
    assert 'class="state bad">killed<' in render(read_run(tmp_path), Cache(tmp_path / FOLDER, until=0.0))


def test_the_command_writes_the_page_and_refuses_other_folders(written: Path, tmp_path: Path) -> None:
    folder = copy_of(written, tmp_path / "copy")
    (folder / PAGE).unlink()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "videox.tracking.report", *words]
        return subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)

    done = run(str(folder))
    assert done.returncode == 0 and (folder / PAGE).is_file() and done.stdout.startswith(str(folder / PAGE)), (
        done.stderr
    )
    assert list(tmp_path.iterdir()) == [folder]


def test_another_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: is not the output_dir of a run. Fix: pass the --output_dir of a run.\n"
    )
    for words in ([], [str(tmp_path), "more"], ["--wrong=1", str(tmp_path)], ["--media_seconds", str(tmp_path)]):
        assert main(words) == 2 and "usage: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pictures_show_what_the_model_gets(written: Path) -> None:
    run = read_run(written)
    clip = training_clips(run)[0]
    path = training_strip(Cache(written / FOLDER, until=0.0), clip, data_dir_of(run))
    frames = read_clip(data_dir_of(run) / clip["path"], [0, 8, 16], 64, 96)
    wanted = np.concatenate([np.asarray(Image.fromarray(frame).resize((128, 85))) for frame in frames], axis=1)
    shown = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert shown.shape == wanted.shape and np.abs(shown - wanted).mean() < 6


def test_the_nearest_training_clip_is_the_one_that_was_sampled(written: Path) -> None:
    text = "".join(Parsed((written / PAGE).read_text(encoding="utf-8")).text)
    assert text.count("Nearest training clip to step 20") == 2 and "): row 4" in text and "): row 5" in text


def test_a_file_that_cannot_be_read_is_tried_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:2] + HOSTILE[4:6], sample_steps=())
    data = Path(json.loads((folder / "data_report.json").read_text(encoding="utf-8"))["data_dir"])
    (data / "0.mp4").write_bytes(b"not a clip at all")
    page = write_page(folder).read_text(encoding="utf-8")
    assert sum(name == "img" for name, _ in Parsed(page).elements) == 3
    assert sorted(path.stat().st_size == 0 for path in (folder / FOLDER).iterdir()) == [False, False, False, True]
    before = {path: path.stat().st_mtime_ns for path in (folder / FOLDER).iterdir()}
    write_page(folder)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / FOLDER).iterdir()}


def test_small_files_of_earlier_data_are_deleted_and_others_stay(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:2], sample_steps=(0,))
    write_page(folder)
    first = {path.name for path in (folder / FOLDER).iterdir()}
    (folder / FOLDER / "notes.txt").write_text("mine")
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    report["clips"][0]["indices"] = [0, 4, 8]
    (folder / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    (folder / "samples" / "step-000000-prompt-1.mp4").unlink()
    write_page(folder)
    names = {path.name for path in (folder / FOLDER).iterdir()}
    assert len(first) == 4 and len(names & first) == 2 and len(names - first) == 2 and "notes.txt" in names


def test_a_run_that_was_copied_without_its_data_keeps_its_pictures(written: Path, tmp_path: Path) -> None:
    folder = copy_of(written, tmp_path / "copy")
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    (folder / "data_report.json").write_text(json.dumps({**report, "data_dir": "nowhere"}), encoding="utf-8")
    page = write_page(folder).read_text(encoding="utf-8")
    assert sum(name == "img" for name, _ in Parsed(page).elements) == len(HOSTILE) + 2


SLOW_IMPORT = """
import sys, time
from pathlib import Path
from videox.tracking.report import media
from videox.tracking.report.page import write_page

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            time.sleep(8)

media.READ_SECONDS = 6
sys.meta_path.insert(0, Slow())
assert "torch" not in sys.modules
write_page(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_slow_import_is_not_taken_for_a_clip_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:3], sample_steps=())
    command = [sys.executable, "-c", SLOW_IMPORT, str(folder)]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_size > 0 for path in (folder / FOLDER).iterdir()] == [True] * 3


def test_without_time_no_picture_is_made(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:3])
    write_page(folder, media_seconds=0.0)
    assert not (folder / FOLDER).exists() and (folder / PAGE).is_file()


def test_a_large_clip_is_reduced_at_its_own_frame_rate(tmp_path: Path) -> None:
    tiny.write_clip(tmp_path / "samples" / "step-000001-prompt-0.mp4", 9, 640, 350, 12)
    (sample,) = read_run(tmp_path).samples
    small = small_clip(Cache(tmp_path / FOLDER, deadline(None)), sample)
    with av.open(str(small)) as container:
        video = container.streams.video[0]
        assert (video.width, video.height, video.average_rate, video.codec_context.pix_fmt) == (
            256,
            140,
            12,
            "yuv420p",
        )
        assert sum(1 for _ in container.decode(video)) == 9
