"""Tests of benchmarks/gpu.py: every measurement runs at small size on the CPU before it is run on a GPU."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from videox.errors import UserError

command = tiny.load_script("benchmarks/gpu.py")
modules = {
    name: sys.modules[f"gpu.{name}"] for name in ("scales", "results", "report", "smoke", "full_step", "training_runs")
}
scales, results, report, smoke, full_step, training = modules.values()

CPU = torch.device("cpu")
SMALL_CASES = command.cases(command.SMALL, command.PARTS)
GPU_ONLY = {"_native_cudnn", "_native_efficient", "_flash_3", "flash", "xformers"}
IN_WORDS = {"result", "figure", "expected", "printed", "seen", "operators", "device"}  # columns whose values are text
MACHINE = {"device": "none", "torch": "2", "diffusers": "0", "processor": "any", "python": "3", "cores": 2}


def small_cases(section: str, *, compiled: bool = False, apart: bool = False) -> list:
    return [
        case
        for case in SMALL_CASES
        if case.section == section
        and case.apart == apart
        and any("compile" in word for word in case.words) == compiled
    ]


# ----------------------------------------------------------------------------------------------------- measurements

SLOW = {"vae", "flags", "step", "checks", "memory"}
IN_PROCESS = [
    pytest.param(part, marks=pytest.mark.slow if part in SLOW else ()) for part in command.PARTS if part != "smoke"
]


@pytest.mark.parametrize("section", IN_PROCESS)
def test_every_case_is_measured_or_has_a_reason(section: str) -> None:
    columns = report.SECTIONS[section]
    selected = small_cases(section)
    assert selected
    for case in selected:
        values, reason = scales.measured(case, CPU)
        assert len(case.words) == len(columns.words)
        assert set(case.predict()) <= set(columns.predicted)
        assert bool(values) != bool(reason)
        shown = set(values) & set(columns.measured)
        assert shown or reason
        if section not in ("checks", "flags"):
            assert set(values) <= set(columns.measured)
        numbers = {key: value for key, value in values.items() if key not in IN_WORDS}
        if section not in ("checks", "step"):  # differences of times vary on a busy CPU
            assert all(value > 0 for key, value in numbers.items() if key != "on the host GiB"), (case.words, values)
        if section == "memory" or (section == "vae" and case.words[2] == "float32"):  # the estimate of --dry_run
            assert case.predict()["predicted GiB"] == pytest.approx(values["peak GiB"], rel=0.1)
        masked_flash = {"text", "_native_flash"} <= set(case.words)
        allowed = masked_flash or set(case.words) & GPU_ONLY or reason.startswith(scales.NOT_RUN)
        busy = section == "step" and reason.startswith(full_step.NOISE)
        assert bool(values) or allowed or busy, (case.words, reason)
        if section == "checks":
            assert reason or values["result"] == "pass", (case.words, values)


@pytest.mark.slow
@pytest.mark.parametrize("section", ["flags", "checks"])
def test_compiled_blocks_are_measured(section: str) -> None:
    for case in small_cases(section, compiled=True):
        values, reason = scales.measured(case, CPU)
        assert not reason, (case.words, reason)
        assert section == "flags" or values["result"] == "pass", (case.words, values)


@pytest.mark.slow
def test_checks_by_the_train_scripts_pass() -> None:
    with removed_workspace():
        for case in small_cases("checks", apart=True):
            values, reason = scales.measured(case, CPU)
            assert not reason and values["result"] == "pass", (case.words, values, reason)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 11 or 12 runs; compilation alone takes minutes on a busy machine
@pytest.mark.parametrize("family", smoke.FAMILIES)
def test_a_family_trains_end_to_end_with_every_flag(family: str) -> None:
    found = results.Results(None, MACHINE, small=True)
    found.begin("smoke")
    with removed_workspace():
        for case in SMALL_CASES:
            if case.section == "smoke" and case.words[0] == family:
                values, reason = scales.measured(case, CPU)
                found.add(results.Row("smoke", case.words, {}, values, reason, 1.0))
    assert results.failures(found.rows) == []
    assert {row.measured["result"] for row in found.rows} == {"pass"}
    assert {row.words[1] for row in found.rows} == {smoke.WHOLE, *smoke.rows_of(family)}


@pytest.mark.slow
def test_a_failed_run_ends_with_its_error() -> None:
    with removed_workspace(), pytest.raises(RuntimeError, match="ended with 2: error: --selective_ac"):
        training.WORKSPACE.train(command.SMALL, "wan2.1", ["--selective_ac", "7"])


@contextlib.contextmanager
def removed_workspace() -> Iterator[None]:
    try:
        yield
    finally:
        folder = training.WORKSPACE.folder
        training.WORKSPACE.close()
        assert not folder.exists()


def test_published_and_small_scales_have_the_same_cases() -> None:
    real, small = (
        [case.section for case in command.cases(scale, command.PARTS)] for scale in (command.REAL, command.SMALL)
    )
    assert set(real) == set(small) == set(command.PARTS) == set(report.SECTIONS) == set(command.BUDGETS)
    assert {section: small.count(section) for section in small} == pytest.approx(
        {section: real.count(section) for section in small}, rel=0.5
    )
    assert sum(command.BUDGETS.values()) <= 60 * command.MINUTES
    words = [(case.section, case.words) for case in command.cases(command.REAL, command.PARTS)]
    assert len(words) == len(set(words)), "a row of a continued run is found by its words"


# ----------------------------------------------------------------------------------------------------- extrapolation


@pytest.mark.parametrize("name", ["Wan2.1 1.3B", "HunyuanVideo"])
def test_the_step_of_a_whole_model_is_linear_in_its_blocks(name: str) -> None:
    config = command.REAL.hunyuan if name == "HunyuanVideo" else command.REAL.wan[name]
    depths = full_step.depths_of(config)

    def seconds(counts: dict[str, int]) -> float:
        return 0.5 + 0.25 * counts["num_layers"] + 0.125 * counts.get("num_single_layers", 0)

    whole = {kind: config[kind] for kind in depths[0]}
    assert full_step.extrapolate(config, [seconds(counts) for counts in depths]) == pytest.approx(seconds(whole))
    with pytest.raises(RuntimeError, match="did not take longer"):
        full_step.extrapolate(config, [1.0] * len(depths))


def test_full_model_memory_is_extrapolated_from_two_truncated_ones() -> None:
    def row(name: str, layers: str, **measured: float) -> object:
        return results.Row("memory", (name, "81x480x832", layers), {}, measured, "", 1.0)

    rows = [row("Wan2.1 14B", layers, **{"peak GiB": peak}) for layers, peak in (("2", 20.0), ("4", 30.0))]
    (line,) = report.whole_model(command.REAL, [*rows, row("Wan2.1 1.3B", "30", **{"peak GiB": 1.0})])
    assert line["extrapolated GiB"] == 30 + 36 * 5
    assert not line["fits 141 GB"]
    (line,) = report.whole_model(command.REAL, [row("Wan2.1 14B", layers) for layers in ("2", "4")])
    assert "extrapolated GiB" not in line
    assert line["predicted GiB"] > 14.2e9 * 16 / 2**30


# ---------------------------------------------------------------------------------------------- results and verdicts


def smoke_row(flags: str, losses: tuple[float, ...], reason: str = "") -> object:
    values = dict(zip(smoke.LOSSES, losses, strict=True)) if losses else {}
    return results.Row("smoke", ("wan2.1", flags), {}, values, reason, 1.0)


def test_losses_are_compared_with_those_of_the_row_without_the_flag() -> None:
    found = results.Results(None, MACHINE, small=True)
    found.begin("smoke")
    keep, offload, compiled, tiled = (
        f"{smoke.EXACT} --gradient_checkpointing_keep attention", f"{smoke.EXACT} --offload_activations",
        f"{smoke.PLAIN} --compile", f"{smoke.PLAIN} --vae_tiling",
    )  # fmt: skip
    given = {
        smoke.EXACT: (1.0, 0.9, 0.8), keep: (1.0, 0.9, 0.8), offload: (1.0, 0.9, 0.8000001), smoke.PLAIN: (1.0, 0.9, 0.81),
        compiled: (1.0, 0.9, 0.9), tiled: (1.0, float("nan"), 0.8),
    }  # fmt: skip
    for flags, losses in given.items():
        found.add(smoke_row(flags, losses))
    verdicts = {row.words[1]: row.measured["result"] for row in found.rows}
    assert verdicts == {
        smoke.EXACT: "pass", keep: "pass", offload: "fail: not bit-identical", smoke.PLAIN: "pass",
        compiled: "fail: not within 0.02", tiled: "fail: a loss is not finite",
    }  # fmt: skip
    assert found.rows[3].measured["difference"] == pytest.approx(0.0125)
    found.add(smoke_row(f"{smoke.PLAIN} --vae_dtype bf16", (), "the run ended with 1: error"))
    assert [line.split(":")[0].split()[-1] for line in results.failures(found.rows)] == [
        "--offload_activations", "--compile", "--vae_tiling", "bf16",
    ]  # fmt: skip


def test_without_a_reference_nothing_is_compared() -> None:
    found = results.Results(None, MACHINE, small=True)
    found.begin("smoke")
    found.add(smoke_row(f"{smoke.EXACT} --low_vram", (1.0, 0.9, 0.8)))
    assert found.rows[0].measured["result"].startswith("not compared") and not results.failures(found.rows)


def test_results_continue_where_they_were_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    first = results.Results(path, MACHINE, small=True)
    first.begin("ceilings")
    first.add(results.Row("ceilings", ("a",), {}, {"ms": 1.0}, "", 1.0))
    first.finish("ceilings")
    first.begin("attention")
    first.add(results.Row("attention", ("a",), {}, {"ms": 1.0}, "", 1.0))
    first.add(results.Row("attention", ("b",), {}, {}, "not started: 1 s of the part were over", 0.0))
    first.finish("attention")
    first.begin("memory")
    first.add(results.Row("memory", ("c",), {"predicted GiB": 9.0}, {"peak GiB": 10.0}, "", 1.0))
    second = results.Results(path, MACHINE, small=True)
    assert {name: bool(part.finished) for name, part in second.parts.items()} == {
        "ceilings": True, "attention": False, "memory": False,
    }  # fmt: skip
    assert second.rows == first.rows
    assert second.rows[-1].measured["GiB error %"] == pytest.approx(-10)
    assert [row.words for row in second.begin("attention").rows] == [("a",)], "what was not started is measured again"


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    results.Results(path, {**MACHINE, "device": "NVIDIA H100"}, small=False).write()
    with pytest.raises(UserError, match="published sizes, here small; device NVIDIA H100, here none"):
        results.Results(path, MACHINE, small=True)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="is not a file of results"):
        results.Results(path, MACHINE, small=True)
    assert path.read_text(encoding="utf-8") == "[]"


def test_a_signal_while_a_process_starts_leaves_none_behind() -> None:
    before = signal.signal(signal.SIGTERM, command.raise_interrupted)
    try:
        with pytest.raises(command.Interruption), training.signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            training.RUNNING.add(process := subprocess.Popen(["sleep", "60"], text=True, start_new_session=True))
        assert process.poll() is None
        training.WORKSPACE.close()
        assert process.returncode == -signal.SIGKILL and not training.RUNNING
    finally:
        signal.signal(signal.SIGTERM, before)


# ----------------------------------------------------------------------------------------------------------- report


def test_a_row_without_a_measurement_shows_its_reason() -> None:
    words = ("Wan2.1 14B", "40 x 128", "32,760", "none", "flash")
    row = results.Row("attention", words, {"forward TFLOP": 22.0}, {}, "no flash | here", 1.0)
    assert (
        report.section_table("attention", [row])[-1]
        == "| " + " | ".join(words) + " | 22 | none: no flash / here |  |  |  |"
    )
    check = results.Row("checks", ("a check",), {"expected": "equal"}, {}, "CUDA error", 1.0)
    assert report.section_table("checks", [check])[-1] == "| a check | equal | fail: CUDA error |  |"


def test_the_page_of_a_gpu_has_measurements_with_dates() -> None:
    row = results.Row(
        "step", ("Wan2.1 14B", "93x480x832", "37,440"), {"predicted s": 20.0, "predicted MFU %": 31.2},
        {"step s": 25.0, "MFU %": 25.0, "s error %": -20.0}, "", 9.0,
    )  # fmt: skip
    known = {**MACHINE, "device": "NVIDIA H100", "memory GiB": 79.6, "cuda": "13.0", "cudnn": 91501}
    text = report.page(known, [row], None, command.REAL, {"step": "2026-12-01 10:00"})
    assert "NVIDIA H100, 80 GiB, CUDA 13.0" in text
    assert "## A whole step, extrapolated (2026-12-01 10:00)" in text
    assert "| Wan2.1 14B | 93x480x832 | 37,440 | 20 | 31.2 | 25 | 25 | -20 |" in text
    assert "not measured" not in text and "small size" not in text


# --------------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_a_measurement_over_its_time_limit_is_skipped() -> None:
    with command.Measurer(command.SMALL, "cpu") as measurer:
        measurer._start()
        process = measurer._process
        compiled = next(
            n for n, case in enumerate(SMALL_CASES) if case.section == "blocks" and "compiled" in case.words
        )
        assert measurer.measure(compiled, 0.05) == ({}, "not finished within its budget of 0 s")
        assert not process.is_alive()
        values, reason = measurer.measure(0, 60)
        assert values and not reason


def test_a_run_that_exceeds_the_time_of_its_part_is_ended_and_left_for_later() -> None:
    def sleep(device: torch.device) -> dict:
        process = training.start([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        training.finish(process, "", training.WORKSPACE.seconds_left(60))
        return {"ms": 1.0}

    found, rows = results.Results(None, MACHINE, small=True), []
    found.begin("smoke")
    session, measurer = command.Session(command.SMALL, "cpu", found), command.Measurer(command.SMALL, "cpu")
    try:
        for seconds, budget in ((0.2, 60.0), (60.0, 0.2)):
            begun = time.monotonic()
            case = scales.Case("smoke", ("wan2.1", "any"), budget, scales.nothing, sleep, apart=True)
            session._run_part([(0, case)], seconds, measurer, rows.append)
            assert time.monotonic() - begun < 30
    finally:
        training.WORKSPACE.end = math.inf
    assert not training.RUNNING
    assert rows[0].reason.startswith(results.NOT_STARTED) and not rows[0].failed, "of the part"
    assert rows[1].reason == "the run has not ended after 0 s" and rows[1].failed, "of the run itself"


@pytest.mark.slow
def test_the_command_is_interrupted_continued_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    words = [sys.executable, "benchmarks/gpu.py", "--small", "--output", str(path), "--parts", "ceilings", "memory"]
    process = subprocess.Popen(words, cwd=tiny.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 300
    while not path.exists() and time.monotonic() < limit:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "interrupted by SIGTERM" in output and "Traceback" not in errors, errors
    before = json.loads(path.read_text())["parts"]
    assert "## Upper bounds" in (tmp_path / "gpu.md").read_text()

    def parts() -> tuple[dict, str]:
        done = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(path.read_text())["parts"], done.stdout

    after, output = parts()
    assert all(part["finished"] for part in after.values())
    for name, part in before.items():
        kept = part["rows"]
        assert after[name]["rows"][: len(kept)] == kept, "a measured row is not measured again"
        assert all(f"{name}  {row['words'][0]}" not in output or name == "memory" for row in kept)
    assert parts()[0] == after
    words.append("--again")
    repeated, _ = parts()
    assert [row["words"] for row in repeated["memory"]["rows"]] == [row["words"] for row in after["memory"]["rows"]]
    assert repeated["memory"]["rows"] != after["memory"]["rows"]


def test_the_committed_page_has_a_row_for_every_case() -> None:
    text = (tiny.ROOT / "benchmarks" / "gpu.md").read_text(encoding="utf-8")
    for case in command.cases(command.REAL, command.PARTS):
        assert "| " + " | ".join(case.words) + " |" in text, case.words
