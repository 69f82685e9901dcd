"""report.html and the records of long runs: bytes, seconds and memory; and what they cost the training. Writes a page.

    python benchmarks/report_page.py [--quick] [--output benchmarks/report_page.md]

Three measurements, without a training: the page of runs of 0 to 36,000 steps, written by the program that a run
starts; steps of a small model on one core with and without pages written beside them; and 36,000 steps through the
classes that record a run. Figures are processor seconds, so that other work on the machine hardly changes them.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import numpy as np
import psutil
import torch
from machine import machine_line
from run_folders import HOSTILE, metric_lines, write_run

from videox.engine.train_state import TrainState
from videox.tracking.corrected_loss import CorrectedLoss
from videox.tracking.jsonl import json_line
from videox.tracking.metrics import MetricsLog, StepRecord
from videox.tracking.progress import ProgressBar, StepClock, StepFacts
from videox.tracking.report.live import LiveReport
from videox.tracking.report.page import PAGE
from videox.tracking.trackers import Tracker
from videox.training.spikes import SpikeDetector

HOUR = 36_000  # steps of an hour at 0.1 s each
CLIPS, REFUSED, SAMPLED = 600, 1000, 40  # training clips, refused rows, steps with samples
BLOCKS, BLOCK_STEPS = 12, 60  # of the comparison with and without pages
PARTS = 6  # in which the recorded hour is measured
NOT_ROWS = ("rows", "buckets")  # the parts of a line whose length follows from the samples of a step


def write_pages(folder: Path, counts: list[int]) -> list[tuple[str, ...]]:
    """Write the page of a run of each length; return rows of the table."""
    found = []
    for steps in counts:
        texts = [text * 3 for text in HOSTILE]
        run = write_run(
            folder / f"run-{steps}", steps=steps, refused=REFUSED, texts=texts,
            sample_steps=range(0, steps + 1, max(steps // SAMPLED, 1)),
        )  # fmt: skip
        report = json.loads((run / "data_report.json").read_text(encoding="utf-8"))
        report["clips"] = [{**report["clips"][i % len(texts)], "row": i} for i in range(CLIPS)]
        (run / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
        first, again = (page_process(run) for _ in range(2))
        size = (run / PAGE).stat().st_size / 1e6
        found.append((f"{steps:,}", f"{size:.1f}", f"{first[0]:.1f}", f"{again[0]:.1f}", f"{again[1]:.0f}"))
        print(f"page of {steps:,} steps: {size:.2f} MB, {first[0]:.1f} s and again {again[0]:.1f} s", flush=True)
    return found


def page_process(run: Path) -> tuple[float, float]:
    """Return the processor seconds and the largest memory in MiB of the program that writes the page."""
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "videox.tracking.report", str(run)])
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"the page of {run} was not written: {status}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def compare_steps(folder: Path) -> list[tuple[str, ...]]:
    """Time steps of a small network in blocks with and without pages beside them; return rows of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = write_run(folder / "live", steps=10_000, refused=REFUSED)
    network = torch.nn.Sequential(*(torch.nn.Linear(384, 384) for _ in range(6)))
    pixels = torch.randn(256, 384)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    calls: list[float] = []
    pages = 0
    for block in range(2 * BLOCKS):
        on = bool(block % 2)
        report = LiveReport(run, 0.01) if on else LiveReport.off()
        report.start()
        for _ in range(BLOCK_STEPS):
            begin = time.process_time()
            network(pixels).square().mean().backward()
            middle = time.process_time()
            report.update(60.0)
            end = time.process_time()
            seconds[on].append(end - begin)
            if on:
                calls.append(end - middle)
        pages += on
        if report._process is not None:  # no page is to be written beside the next block
            report._process.kill()
            report._process.wait()
    without, with_pages = (statistics.median(seconds[on]) for on in (False, True))
    start = start_seconds(run)
    print(f"step {without * 1e3:.3f} ms, with a page beside it {with_pages * 1e3:.3f} ms; start {start * 1e3:.2f} ms")
    return [
        ("median step without pages", f"{without * 1e3:.2f} ms"),
        (f"median step while a page is written beside it ({pages} pages)", f"{with_pages * 1e3:.2f} ms"),
        ("difference", f"{with_pages / without - 1:+.2%}"),
        ("`LiveReport.update`, median of its calls", f"{statistics.median(calls) * 1e6:.1f} us"),
        ("start of the program that writes a page, at most once in 60 s", f"{start * 1e3:.2f} ms"),
        ("both, as a share of the time of a run with steps of 0.1 s",
         f"{statistics.median(calls) / 0.1 + start / 60:.3%}"),
    ]  # fmt: skip


def start_seconds(run: Path) -> float:
    """Return the median processor time of this process for starting the program."""
    found = []
    for _ in range(9):
        report = LiveReport(run, 0.01)
        begin = time.process_time()
        report.start()
        found.append(time.process_time() - begin)
        assert report._process is not None
        report._process.kill()
        report._process.wait()
    return statistics.median(found)


@contextmanager
def recording(folder: Path, log: io.TextIOBase) -> Iterator[tuple[MetricsLog, ProgressBar, Tracker]]:
    """Yield what a run records its steps with."""
    bar = ProgressBar(HOUR, stream=log)
    tracker = Tracker("tensorboard", folder / "logs", project="videox", settings={})
    yield MetricsLog(folder), bar, tracker
    bar.close()
    tracker.close()


def record_hour(folder: Path, steps: int) -> list[tuple[str, ...]]:
    """Record steps as a run does, as fast as possible; return rows of the table."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    state = TrainState(seed=0, slots=1, index="", settings={}, run="hour")
    corrected, spikes, clock = CorrectedLoss(state.loss_means), SpikeDetector(state, skip=False), StepClock()
    lines = metric_lines(200)
    found = []
    with (folder / "train.log").open("w", encoding="utf-8") as log, recording(folder, log) as (metrics, bar, tracker):
        for step in range(1, steps + 1):
            bands, losses = draw.integers(0, 16, 4).tolist(), (0.1 + draw.random(4)).tolist()
            loss = sum(losses) / 4
            better = corrected.add(bands, ["17x64x96"] * 4, losses)
            spikes.add(loss, 1.0)
            line = lines[step % 200]
            extra = {
                name: value for name, value in line.items() if name.endswith(("_seconds", "_gib")) or name == "mfu"
            }
            times = clock.count(1000, 0.1, 0.001)
            record = StepRecord(
                step, loss, 1e-4, 1.0, 1000, times.tokens_per_second, 0.001, [step % 12] * 4, [(17, 64, 96)] * 4,
                {**extra, "planned_balance": 0.97, "straggler_share": 0.05}, better,
            )  # fmt: skip
            metrics.append(record)
            tracker.log(record)
            bar.update(loss, times.smooth_tokens_per_second, times.wait_share, StepFacts(step / 100, 1e-4, 40.0))
            if step % (steps // PARTS) == 0:
                found.append(state_of(folder, record, state, step))
    return found


def state_of(folder: Path, record: StepRecord, state: TrainState, step: int) -> tuple[str, ...]:
    """Return a row of the table: memory and bytes after a number of recorded steps."""
    gc.collect()
    memory = psutil.Process().memory_info().rss / 2**20
    line = record.as_dict()
    beside = len(json_line({name: value for name, value in line.items() if name not in NOT_ROWS}))
    log = (folder / "train.log").stat().st_size
    saved = len(json.dumps(asdict(state)))
    print(f"{step:,} steps: {memory:.0f} MiB, {beside} bytes a step, log {log:,}, state {saved:,}", flush=True)
    whole = len(json_line(line))
    return f"{step:,}", f"{memory:.0f}", f"{whole}", f"{beside}", f"{log:,}", f"{saved:,}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return a table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps; no page is written")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    args = parser.parse_args()
    counts = [0, 1000] if args.quick else [0, 10_000, HOUR]
    with tempfile.TemporaryDirectory(prefix="videox-report-") as name:
        folder = Path(name)
        hour = record_hour(folder / "hour", HOUR // 10 if args.quick else HOUR)
        pages = write_pages(folder, counts)
        steps = compare_steps(folder)
    lines = [
        "# report.html and the records of long runs", "",
        "Written by `python benchmarks/report_page.py`. Seconds are processor time.", "",
        f"## The page of a run with {CLIPS} training clips, {REFUSED:,} refused rows and {SAMPLED} steps with samples", "",
        *table(("steps", "MB", "seconds, with the pictures", "seconds, written again", "MiB of the program"), pages), "",
        "## What it costs the training", "",
        "Steps of a small network on one core, in blocks with and without a page of 10,000 steps written beside them.", "",
        *table(("what", "time"), steps), "",
        "## An hour of steps of 0.1 s", "",
        "Recorded as fast as possible by the classes that a run uses: metrics.jsonl, corrected loss, spikes, TensorBoard, "
        "progress lines. A progress line is written every 30 s, whatever the number of steps.", "",
        *table(("steps", "MiB of the process", "bytes of a line", "beside rows and buckets", "bytes of the log",
                "bytes of the train state"), hour), "",
        machine_line("torch"), "",
    ]  # fmt: skip
    if not args.quick:
        args.output.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
