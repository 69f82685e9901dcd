"""Tests of videox.doctor.software: GPUs against the driver and torch, pins, variables, accelerate, broken packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
from packaging.markers import Marker

from videox.distributed.gpus import Driver, Gpu, TorchBuild
from videox.doctor import software
from videox.doctor.findings import BLOCKS, NOTE, Finding
from videox.doctor.software import (
    accelerate,
    applies,
    attention,
    check_capability,
    compare_driver,
    packages,
    pins,
    variables,
)

environments = tiny.load_script("benchmarks/environments.py")
CUDA13 = TorchBuild("2.13.0", "13.0", None, None)
CPU = TorchBuild("2.13.0+cpu", None, None, None)
H100 = Gpu("NVIDIA H100", 80 * 2**30, (9, 0), divided=False)
TURING = Gpu("NVIDIA T4", 16 * 2**30, (7, 5), divided=False)
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"]


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


@pytest.mark.parametrize(
    ("build", "driver", "facts", "expected"),
    [
        (CUDA13, Driver("580.65", (13, 0), (H100,)), {"gpus": [{}]}, ""),
        (CUDA13, Driver("570.86", (12, 8), (H100,)), {"gpus": []}, "install driver 580 or newer"),
        (CPU, Driver("580.65", (13, 0), (H100,)), {"gpus": []}, "pip install --force-reinstall torch==2.13.0"),
        (CUDA13, Driver("580.65", (13, 0), (H100,)), {"gpus": [], "error": "unknown error"}, "restart the machine"),
        (None, Driver("580.65", (13, 0), (H100,)), {}, ""),  # reported as not installed
        (TorchBuild("2.13.0", None, "6.4", None), None, {"gpus": [{}]}, ""),
    ],
)
def test_driver_and_torch_are_compared(
    build: TorchBuild | None, driver: Driver | None, facts: dict[str, object], expected: str, tmp_path: Path
) -> None:
    findings = compare_driver(build, driver, facts, tmp_path)
    assert levels(findings) == ([BLOCKS] if expected else [])
    assert all(expected in finding.fix for finding in findings)


def test_a_gpu_without_a_driver_blocks(tmp_path: Path) -> None:
    assert levels(compare_driver(CUDA13, None, {}, tmp_path)) == [NOTE]
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    for name, text in (("vendor", "0x10de\n"), ("class", "0x030200\n")):
        (device / name).write_text(text, encoding="ascii")
    (finding,) = compare_driver(CUDA13, None, {}, tmp_path)
    assert finding.level == BLOCKS and "--gpus all" in finding.fix


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), []),
        ((8, 6), []),
        ((12, 1), []),
        ((13, 0), []),
        ((7, 5), [NOTE]),
        ((7, 0), [BLOCKS, NOTE]),
        ((10, 0), [BLOCKS]),
    ],
)
def test_kernels_fit_the_compute_capability(capability: tuple[int, int], expected: list[str]) -> None:
    # binary code runs on later minor versions of its major version, PTX (compute_) on all later ones
    gpu = Gpu("GPU", 2**30, capability, divided=False)
    assert levels(check_capability(0, gpu, ARCHITECTURES)) == expected
    assert levels(check_capability(0, TURING, [])) == [NOTE]


def test_missing_kernels_of_attention_are_named() -> None:
    assert levels(attention({"flash": "", "math": ""})) == ["ok"]
    (finding,) = attention({"flash": "needs sm80", "math": ""})
    assert finding.level == NOTE and "flash: needs sm80" in finding.text
    assert attention({}) == []


def test_pins_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pins()["torch"][0] == "2.13.0" and "Linux" in pins()["deepspeed"][1]
    assert pins(Path("/nowhere")) == {}
    assert BLOCKS not in levels(packages({}, ""))
    monkeypatch.setattr(
        software,
        "pins",
        lambda: {"no-such-package": ("1", ""), "torch": ("1.0", ""), "not-here": ("1", 'os_name == "x"')},
    )
    findings = {finding.name: finding for finding in packages({"av": "ImportError: libx.so"}, "")}
    assert findings["missing packages"].text == "no-such-package" and findings["missing packages"].level == BLOCKS
    assert "(pinned: 1.0)" in findings["other versions"].text
    assert findings["av"].level == BLOCKS and "libx.so" in findings["av"].text


def test_markers_are_read_as_pip_reads_them() -> None:
    markers = [marker for _, marker in pins().values() if marker]
    assert len(markers) > 1
    assert [applies(marker) for marker in markers] == [Marker(marker).evaluate() for marker in markers]
    assert applies("") and not applies('sys_platform == "win32" or platform_system == "Windows"')


def test_variables_are_checked_as_a_run_does(tmp_path: Path) -> None:
    findings = variables({"LOCAL_RANK": "0", "WORLD_SIZE": "2"})
    assert [finding.name for finding in findings if finding.level == BLOCKS] == ["variables"]
    assert "`unset WORLD_SIZE LOCAL_RANK`" in findings[-1].fix
    (tmp_path / "sys/class/net/eth0").mkdir(parents=True)
    for value, expected in (("eth0", []), ("eth", []), ("^lo,docker", []), ("=eth0", []), ("ib0", ["network"])):
        found = variables({"NCCL_SOCKET_IFNAME": value}, tmp_path)
        assert [finding.name for finding in found if finding.level == BLOCKS] == expected, value


def test_accelerates_default_configuration_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.gpus, "visible_gpus", lambda _: 2)
    home = {"HF_HOME": str(tmp_path)}
    (finding,) = accelerate(home)
    assert "no default configuration" in finding.text
    (tmp_path / "accelerate").mkdir()
    path = tmp_path / "accelerate/default_config.yaml"
    for text, expected in (
        (environments.EIGHT_GPUS, [BLOCKS]),
        (environments.EIGHT_GPUS.replace(": 8", ": 2"), []),
        (environments.TWO_MACHINES, [NOTE, BLOCKS]),
        (environments.FSDP_YAML, [BLOCKS]),
        (environments.FSDP_YAML.replace("WanAttentionBlock", "WanTransformerBlock").replace("bf16", "fp16"), [NOTE]),
        ("a: [", [BLOCKS]),
    ):
        path.write_text(text, encoding="utf-8")
        findings = accelerate(home)
        assert [finding.level for finding in findings if finding.level != "ok"] == expected, text
        assert all(finding.fix for finding in findings if finding.level != "ok")


def run_doctor(*python: str, **variables_: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "videox.doctor"],
        cwd=runs.ROOT, env={**os.environ, "PYTHONPATH": str(runs.ROOT), **variables_}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_the_doctor_runs_without_any_package(tmp_path: Path) -> None:
    """-S leaves site-packages out, as after a failed installation; a left-over variable is named, too."""
    done = run_doctor("-S", "-P", WORLD_SIZE="2", HF_TOKEN="hf_secret", HF_HOME=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    blocking = done.stdout[done.stdout.index("what blocks a run") : done.stdout.index("what to know")]
    assert "torch: not installed" in blocking and "missing packages: " in blocking and "diffusers" in blocking
    assert "`unset WORLD_SIZE`" in blocking
    assert "hf_secret" not in done.stdout and "HF_TOKEN" in done.stdout


@pytest.mark.slow
def test_the_doctor_finds_this_machine_sound_and_a_broken_torch_not(tmp_path: Path) -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stdout
    assert "0 blocking" in done.stdout and "attention" in done.stdout and "built extensions" in done.stdout
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.13.0'\ncuda = '13.0'\n", encoding="utf-8")
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.13: no such file')\n", encoding="utf-8")
    broken = run_doctor(PYTHONPATH=f"{tmp_path}{os.pathsep}{runs.ROOT}")
    assert broken.returncode == 1
    assert "torch: cannot be imported: OSError: libcudart.so.13: no such file" in broken.stdout
    assert "Traceback" not in broken.stdout + broken.stderr


def test_a_slow_import_is_no_broken_installation() -> None:
    slow, broken = (
        software.not_imported("torch", text) for text in (f"{software.NO_ANSWER} 180 s", "ImportError: libc")
    )
    assert (slow.level, broken.level) == (NOTE, BLOCKS) and "idle" in slow.fix
