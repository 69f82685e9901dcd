"""Helpers for the tests of metrics and trackers: a step record, and Python code in a separate process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from videox.tracking.metrics import StepRecord

ROOT = Path(__file__).resolve().parents[2]


def record(step: int, **changed) -> StepRecord:
    fields = {
        "step": step,
        "loss": 0.5,
        "lr": 2e-5,
        "grad_norm": 1.25,
        "tokens": 13312,
        "tokens_per_second": 1000.0,
        "data_wait": 0.01,
        "rows": [3, 1],
        "buckets": [(49, 512, 512), (1, 256, 992)],
    }
    return StepRecord(**(fields | changed))


def run_python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)
