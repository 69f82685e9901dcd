"""Tests of benchmarks/gpu.py: every measurement runs at small size on the CPU before it is run on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

gpu = tiny.load_script("benchmarks/gpu.py")
scales = sys.modules["gpu_scales"]

CPU = torch.device("cpu")
SMALL_CASES = [case for case in gpu.cases(gpu.SMALL, gpu.PARTS) if "compiled" not in case.words]
GPU_ONLY = {"_native_cudnn", "_native_efficient", "_flash_3", "flash", "xformers"}


SECTIONS = [pytest.param(part, marks=pytest.mark.slow if part == "encoders" else ()) for part in gpu.PARTS]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_case_is_measured_or_has_a_reason(section: str) -> None:
    columns = gpu.SECTIONS[section]
    selected = [case for case in SMALL_CASES if case.section == section]
    assert selected
    for case in selected:
        values, reason = scales.measured(case, CPU)
        assert len(case.words) == len(columns[1])
        assert set(case.predict()) <= set(columns[2])
        assert set(values) <= set(columns[3])
        assert bool(values) != bool(reason)
        assert all(value > 0 for value in values.values()), (case.words, values)
        if section == "memory" or "float32" in case.words:  # the estimate of --dry_run
            assert case.predict()["predicted GiB"] == pytest.approx(values["peak GiB"], rel=0.1)
        masked_flash = {"text", "_native_flash"} <= set(case.words)
        assert bool(values) or masked_flash or set(case.words) & GPU_ONLY, (case.words, reason)


def test_published_and_small_scales_have_the_same_cases() -> None:
    real, small = ([case.section for case in gpu.cases(scale, gpu.PARTS)] for scale in (gpu.REAL, gpu.SMALL))
    assert set(real) == set(small) == set(gpu.PARTS)
    assert {section: small.count(section) for section in small} == pytest.approx(
        {section: real.count(section) for section in small}, rel=0.5
    )
    assert sum(case.budget for case in gpu.cases(gpu.REAL, {"memory"})) < 60 * gpu.MINUTES


def test_full_model_memory_is_extrapolated_from_two_truncated_ones() -> None:
    rows = [
        gpu.Row("memory", ("Wan2.1 14B", "81x480x832", layers), {}, {"peak GiB": peak}, "", 1.0)
        for layers, peak in (("2", 20.0), ("4", 30.0))
    ]
    (line,) = gpu.whole_model(gpu.REAL, rows)
    assert line["extrapolated GiB"] == 30 + 36 * 5
    assert not line["fits 141 GB"]
    (line,) = gpu.whole_model(gpu.REAL, [gpu.replace(row, measured={}, reason="none") for row in rows])
    assert "extrapolated GiB" not in line
    assert line["predicted GiB"] > 14.2e9 * 16 / 2**30


def test_a_row_without_a_measurement_shows_its_reason() -> None:
    words = ("Wan2.1 14B", "40 x 128", "32,760", "none", "flash")
    row = gpu.Row("attention", words, {"forward TFLOP": 22.0}, {}, "no flash | here", 1.0)
    assert (
        gpu.section_table("attention", [row])[-1]
        == "| " + " | ".join(words) + " | 22 | none: no flash / here |  |  |  |"
    )


@pytest.mark.slow
def test_a_measurement_over_its_time_limit_is_skipped() -> None:
    with gpu.Measurer(gpu.SMALL, "cpu") as measurer:
        measurer._start()
        process = measurer._process
        compiled = next(n for n, case in enumerate(gpu.cases(gpu.SMALL, gpu.PARTS)) if "compiled" in case.words)
        assert measurer.measure(compiled, 0.05) == ({}, "not finished within its budget of 0 s")
        assert not process.is_alive()
        values, reason = measurer.measure(0, 60)
        assert values and not reason


@pytest.mark.slow
def test_the_command_writes_json_and_markdown(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--only", "ceilings", "memory"]
    command += ["--output", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["small"] and {row["section"] for row in found["rows"]} == {"ceilings", "memory"}
    assert len(found["whole_model"]) == 2
    text = (tmp_path / "gpu.md").read_text()
    real = gpu.cases(gpu.REAL, gpu.PARTS)
    assert text.count("| not measured |") >= len(real)
    assert "## Full fine-tuning: peak memory of a step, small" in text
