"""Writes the files of a run without training: metrics, validation, data report, samples, events, for its page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import tiny

# What a caption, path or prompt may contain: markup, ends of elements and attributes, quotes, other scripts, right to
# left, combining characters, emoji, controls, half a surrogate pair, and a byte that no text should have.
HOSTILE = (
    "<script>alert(1)</script>",
    "</script></style></title></textarea><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "'><svg/onload=alert(1)>",
    "&lt;b&gt; &amp; &#60;",
    "<!-- ]]> --> javascript:alert(1)",
    "一只猫在雨中走过街道",
    "قطة تمشي في المطر",
    "e\u0301 \u202eevil\u202c 🐈‍⬛",
    "a\x00b\x07c\x1b[31m",
    "half \ud83d of a pair",
    "{{7*7}} ${7*7} `x`",
)


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.text.append(text)

    def handle_comment(self, text: str) -> None:
        raise AssertionError(f"a comment: {text}")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def metric_lines(steps: int, *, rows: int = 12) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        seconds = 1 + 0.2 * math.sin(step) + draw.random() * 0.1
        line: dict[str, Any] = {
            "step": step, "loss": 1 / math.sqrt(step) + 0.2 + draw.normal() * 0.1, "lr": 1e-4 * min(step / 50, 1),
            "grad_norm": math.exp(draw.normal()), "tokens": 1000, "tokens_per_second": 1000 / seconds,
            "data_wait": 0.02 * seconds, "planned_balance": 0.97, "straggler_share": 0.05, "mfu": 0.38,
            "step_seconds": seconds, "encode_seconds": 0.1, "forward_seconds": 0.3, "backward_seconds": 0.5,
            "optimizer_seconds": 0.05, "peak_allocated_gib": 40.5, "peak_reserved_gib": 44.0, "predicted_gib": 41.0,
            "rows": [step % rows, (step + 5) % rows], "buckets": [[17, 64, 96], [17, 64, 96]],
        }  # fmt: skip
        if step % 997 == 500:
            line |= {"loss": None, "grad_norm": None, "non_finite": True}
        lines.append(line)
    return lines


def write_run(
    folder: Path, *, steps: int = 60, refused: int = 3, texts: Sequence[str] = HOSTILE, sample_steps: Sequence[int] = (0, 20)
) -> Path:  # fmt: skip
    """Write the files of a run with `steps` done of twice as many, and its data of one clip or image per text."""
    folder.mkdir(parents=True)
    data = folder.parent / f"{folder.name}-data"
    clips, held = [], []
    for row, text in enumerate(texts):
        if row % 4 == 3:
            path, kind, bucket, indices = (
                tiny.write_image(data / f"{row}.png", 96, 64, seed=row),
                "image",
                [1, 64, 96],
                [0],
            )
        else:
            path = tiny.write_clip(data / f"{row}.mp4", 17, 96, 64, seed=row)
            kind, bucket, indices = "video", [17, 64, 96], [0, 8, 16]
        fate = "held_out" if row == 1 else "trained"
        clip = {
            "row": row, "path": path.name, "caption": text, "kind": kind, "fate": fate, "bucket": bucket,
            "indices": indices, "cropped": 0.1,
        }  # fmt: skip
        clips.append(clip)
        if fate == "held_out":
            held.append({"row": row, "path": path.name, "caption": text})
    report = {
        "epoch": 0, "data_dir": str(data), "rows": len(texts) + refused,
        "fates": {"trained": len(texts) - 1, "held_out": 1, "refused": refused}, "steps": 30, "slots": 1,
        "buckets": [{"frames": 17, "height": 64, "width": 96, "tokens": 120, "samples": 9, "batches": 9}],
        "cropped": {"median": 0.1, "p95": 0.2, "max": 0.3}, "held_out": held, "held_out_total": 1,
        "cropped_rows": [{"row": 2, "path": "2.mp4", "cropped": 0.3}], "cropped_rows_total": 1,
        "clips": clips, "clips_total": len(clips),
    }  # fmt: skip
    (folder / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    asked = {
        "validation_prompts": list(texts[:2]),
        "validation_paths": [],
        "learning_rate": 1e-4,
        "recipe": texts[2 % len(texts)],
    }
    args = {"asked": asked, "resolved": {"total_steps": 2 * steps, "seed": 3}}
    (folder / "args.json").write_text(json.dumps(args), encoding="utf-8")
    status = {
        "state": "stopped", "exit_code": 75, "step": steps, "error": f"stopped {texts[1 % len(texts)]}", "pid": 1, "host": "here",
        "started": "1", "updated": 1.8e9,
    }  # fmt: skip
    (folder / "run_status.json").write_text(json.dumps(status), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", metric_lines(steps))
    validation = [
        {"step": step, "loss": 1 / (1 + step), "ema_loss": 1.1 / (1 + step),
         "per_sigma": [[sigma, sigma / (1 + step)] for sigma in (0.25, 0.5, 0.9)]}
        for step in range(0, steps + 1, max(steps // 6, 1))
    ]  # fmt: skip
    write_lines(folder / "validation.jsonl", validation)
    lost = [
        {"row": i, "path": texts[i % len(texts)], "class": "truncated", "detail": texts[-i % len(texts)]}
        for i in range(refused)
    ]
    write_lines(folder / "refused_rows.jsonl", lost)
    write_lines(folder / "bad_samples.jsonl", [{**lost[0], "step": 7, "rank": 0}] if lost else [])
    launch = {"event": "launch", "time": 1.79e9, "command": f"python train.py --x {texts[0]}", "script": "train.py"}
    events = [
        {**launch, "step": 0, "processes": 1, "backend": "single"},
        {"event": "end", "step": 30, "time": 1.7901e9, "state": "stopped", "error": texts[3 % len(texts)]},
        {**launch, "step": 30, "processes": 1, "backend": "single", "resumed_from": "checkpoint-30",
         "changed": [f"--prompt was {texts[1 % len(texts)]} and is {texts[4 % len(texts)]}"]},
    ]  # fmt: skip
    write_lines(folder / "events.jsonl", events)
    for step in sample_steps:
        for number in range(2):
            path = folder / "samples" / f"step-{step:06d}-prompt-{number}.mp4"
            tiny.write_clip(path, 17, 96, 64, seed=number + 4)  # prompt 0 is sampled as the clip of row 4
    (folder / "checkpoint-30").mkdir()
    return folder
