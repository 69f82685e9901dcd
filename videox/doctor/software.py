"""Packages, GPUs, attention kernels, DeepSpeed, variables and accelerate's configuration of this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from videox.distributed import gpus
from videox.distributed.accelerate_config import default_config, default_path
from videox.distributed.backends import TRUE_VALUES
from videox.distributed.environment import LAYERS_FLAG, check_environment, refuse_unknown_layers
from videox.distributed.launcher import describe, refuse_processes
from videox.doctor.findings import BLOCKS, NOTE, OK, Finding, from_error, gib, shown_variables
from videox.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PROBE_SECONDS = 180  # for importing torch from a slow disk
NO_ANSWER = "does not answer within"
SETUP = "`make setup`, or `pip install -r requirements.txt`"
# Packages that only some runs need: what does not work without them.
OPTIONAL = {
    "deepspeed": "DeepSpeed (ZeRO) does not work", "decord": "--video_reader decord does not work",
    "tensorboard": "--report_to tensorboard does not work", "matplotlib": "losses.png is not drawn",
    "imageio": "sample clips are not written", "imageio-ffmpeg": "sample clips are not written",
}  # fmt: skip
# The lowest driver for each major version of CUDA that torch is built for, from NVIDIA's CUDA compatibility page.
DRIVERS = {11: "450", 12: "525", 13: "580"}


class Probes:
    """Probe processes (videox.doctor.probe), all started at once; their answers are waited for one by one."""

    def __init__(self, names: Sequence[str], environment: Mapping[str, str]) -> None:
        flags = ["-S"] if sys.flags.no_site else []  # the same packages as this process
        path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH", ""))))
        self._processes = {
            name: subprocess.Popen(
                [sys.executable, *flags, "-m", "videox.doctor.probe", name],
                env={**environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace",
            )
            for name in names
        }  # fmt: skip

    def answer(self, name: str) -> tuple[Mapping[str, Any], str]:
        """Return the facts of a probe, and why there are none ("" if there are)."""
        process = self._processes[name]
        try:
            out, error = process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {}, f"{NO_ANSWER} {PROBE_SECONDS} s"
        if process.returncode == 0:
            return json.loads(out), ""
        if process.returncode < 0:
            return {}, f"its import ends with signal {-process.returncode}"
        lines = [line for line in error.splitlines() if line.strip()]
        return {}, lines[-1] if lines else f"its import ends with code {process.returncode}"


def pins(root: Path = ROOT) -> dict[str, tuple[str, str]]:
    """Return (version, marker) by package of requirements.txt; empty where the file is not there."""
    file = root / "requirements.txt"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.findall(r"^([\w-]+)==([\w.]+)(?: ; (.+))?$", text, flags=re.MULTILINE)
    return {name: (version, marker) for name, version, marker in found}


def applies(marker: str) -> bool:
    """Return whether a pin with this marker is for this machine; True for one without a marker.

    Only what the markers of requirements.txt use: equalities, joined by "and" and then by "or". The package that reads
    every marker may be missing here.
    """
    values = {
        "platform_system": platform.system(), "platform_machine": platform.machine(), "sys_platform": sys.platform,
    }  # fmt: skip
    parts = [re.findall(r'(\w+) == "([^"]*)"', part) for part in marker.split(" or ")]
    return not marker or any(all(values.get(name) == value for name, value in part) for part in parts)


def packages(imports: Mapping[str, str], failure: str) -> list[Finding]:
    """Compare the installed packages with the pins.

    Args:
        imports: the probe's answer: error by module, "" if it can be imported.
        failure: why there is no answer.
    """
    findings, missing, other = [], [], []
    pinned = pins()
    for name, (version, marker) in pinned.items():
        if not applies(marker):
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in OPTIONAL:
                findings.append(
                    Finding(name, f"not installed: {OPTIONAL[name]}", NOTE, f"`pip install {name}=={version}`")
                )
            else:
                missing.append(name)
            continue
        if installed.split("+")[0] != version:
            other.append(f"{name} {installed} (pinned: {version})")
    count = len(pinned) - len(missing) - len(other) - len(findings)
    findings.insert(
        0, Finding("pins", f"{count} of {len(pinned)} packages of requirements.txt are as pinned or not needed here")
    )
    if missing:
        findings.append(Finding("missing packages", ", ".join(missing), BLOCKS, SETUP))
    if other:
        findings.append(Finding("other versions", ", ".join(other), NOTE, SETUP))
    broken = {name: error for name, error in imports.items() if error and name not in missing}
    for name, error in broken.items():
        if not (error.startswith("ModuleNotFoundError") and missing):
            findings.append(not_imported(name, error))
    if failure:
        findings.append(not_imported("imports", failure))
    compiler = next(
        (name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name and shutil.which(name)), ""
    )
    text = compiler or "none: DeepSpeed and adamw_bf16_offload compile at their first use"
    findings.append(Finding("C++ compiler", text, OK if compiler else NOTE, "" if compiler else "`apt install g++`"))
    return findings


def not_imported(name: str, failure: str) -> Finding:
    """Return the finding for a package that cannot be imported; on a busy machine an import may only be slow."""
    if failure.startswith(NO_ANSWER):
        return Finding(name, failure, NOTE, "run the doctor again when the machine is idle")
    return Finding(name, f"cannot be imported: {failure}", BLOCKS, SETUP)


def torch_and_gpus(facts: Mapping[str, Any], failure: str, environment: Mapping[str, str]) -> list[Finding]:
    """Return torch, the driver, the GPUs and the attention kernels, compared with each other.

    Args:
        facts: of the probe.
        failure: why torch could not be asked.
        environment: with CUDA_VISIBLE_DEVICES.
    """
    build, driver = gpus.torch_build(), gpus.driver()
    findings = []
    if build is None:
        findings.append(Finding("torch", "not installed", BLOCKS, SETUP))
    else:
        made_for = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.hip}" if build.hip else "CPUs"
        findings.append(Finding("torch", f"{build.version}, built for {made_for}"))
    if failure and build is not None:
        findings.append(not_imported("torch", failure))
    if driver is not None:
        findings.append(Finding("driver", f"{driver.version}, for CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"))
    findings += compare_driver(build, driver, facts)
    for index, gpu in enumerate(driver.gpus if driver else ()):
        text = f"{gpu.name}, {gib(gpu.memory)}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        findings.append(Finding(f"GPU {index}", text + (", divided (MIG)" if gpu.divided else "")))
        findings += check_capability(index, gpu, facts.get("architectures", ()))
    if facts.get("nccl"):
        findings.append(Finding("NCCL", facts["nccl"]))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if driver is not None and visible is not None and gpus.count_visible(environment, len(driver.gpus)) == 0:
        text = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        findings.append(Finding("GPUs", text, BLOCKS, "`unset CUDA_VISIBLE_DEVICES`"))
    return findings + attention(facts.get("attention", {}))


def compare_driver(
    build: gpus.TorchBuild | None, driver: gpus.Driver | None, facts: Mapping[str, Any], root: Path = Path("/")
) -> list[Finding]:
    """Return what does not fit between torch, the driver and the hardware.

    Args:
        build: of torch; None = not installed.
        driver: None = none answers.
        facts: of the probe.
        root: of the file system, for the PCI devices.
    """
    if build is None or build.hip or build.xpu:
        return []
    vendors = [path.read_text(encoding="ascii").strip() for path in root.glob("sys/bus/pci/devices/*/vendor")]
    classes = [path.read_text(encoding="ascii").strip() for path in root.glob("sys/bus/pci/devices/*/class")]
    hardware = any(pair[0] == "0x10de" and pair[1][:4] == "0x03" for pair in zip(vendors, classes, strict=True))
    if driver is None:
        if hardware:
            fix = "install NVIDIA's driver, or start the container with `--gpus all`"
            return [Finding("driver", "an NVIDIA GPU is there, but its driver does not answer", BLOCKS, fix)]
        text = "no NVIDIA GPU was found: everything runs on the CPU, which is enough for `make demo` alone"
        return [Finding("GPUs", text, NOTE, "train on a machine with an NVIDIA GPU")]
    if build.cuda is None:
        fix = f"`pip install --force-reinstall torch=={build.version.split('+')[0]}`"
        return [Finding("torch", "built for CPUs, but there is a GPU", BLOCKS, fix)]
    major = int(build.cuda.split(".")[0])
    if driver.cuda[0] < major:
        text = f"torch is built for CUDA {build.cuda}, driver {driver.version} is for CUDA {driver.cuda[0]}.{driver.cuda[1]}"
        return [Finding("driver", text, BLOCKS, f"install driver {DRIVERS.get(major, 'of this year')} or newer")]
    if facts and not facts.get("gpus"):
        text = f"torch finds no GPU: {facts.get('error', 'torch.cuda.is_available() is False')}"
        return [Finding("GPUs", text, BLOCKS, "restart the machine or the container after a change of the driver")]
    return []


def check_capability(index: int, gpu: gpus.Gpu, architectures: Sequence[str]) -> list[Finding]:
    """Return what a GPU cannot do.

    Args:
        index: of the GPU.
        gpu: its description.
        architectures: that torch has kernels for, e.g. sm_90 or compute_90; empty = not known.
    """
    major, minor = gpu.capability
    found = [
        (kind, int(number[:-1]), int(number[-1]))
        for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures))
    ]
    runs = any(
        (kind == "sm" and m == major and n <= minor) or (kind == "compute" and (m, n) <= (major, minor))
        for kind, m, n in found
    )
    findings = []
    if found and not runs:
        text = f"torch has no kernels for compute capability {major}.{minor}, only for {' '.join(architectures)}"
        findings.append(Finding(f"GPU {index}", text, BLOCKS, "use another GPU"))
    if gpu.capability < (8, 0):
        text = "computes bf16 slowly or not at all, and has no flash attention"
        findings.append(Finding(f"GPU {index}", text, NOTE, "use a GPU of compute capability 8.0 (Ampere) or newer"))
    return findings


def attention(kernels: Mapping[str, str]) -> list[Finding]:
    """Return which kernels of scaled_dot_product_attention ran; the trainer uses the fastest that torch selects."""
    if not kernels:
        return []
    working = [name for name, error in kernels.items() if not error]
    text = f"{', '.join(working) or 'none'} (bf16, heads of 128, with the backward pass)"
    if set(working) - {"math"}:
        return [Finding("attention", text)]
    why = "; ".join(f"{name}: {error}" for name, error in kernels.items() if error)
    fix = "use a GPU of compute capability 8.0 or newer: without these kernels the memory grows with the square of the tokens"
    return [Finding("attention", f"{text}; {why}", NOTE, fix)]


def deepspeed(facts: Mapping[str, Any], failure: str) -> list[Finding]:
    """Return the state of DeepSpeed's extensions; nothing where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        return []
    if failure:
        return [Finding("DeepSpeed", f"cannot be imported: {failure}", NOTE, f"{SETUP}; only ZeRO needs it")]
    built = ", ".join(facts["built"]) or "none yet; they are compiled at the first use, in a minute or two"
    findings = [
        Finding("DeepSpeed", f"{facts['version']}, extensions in {facts['folder']}"),
        Finding("built extensions", built),
    ]
    if not facts["cpu_adam"]:
        text = "the extension of config/zero_stage3_config_cpu_offload.json (cpu_adam) cannot be compiled here"
        findings.append(
            Finding("DeepSpeed", text, NOTE, "install a C++ compiler, and the CUDA toolkit of torch's version")
        )
    if facts["lock"][0]:
        where, what, hint = facts["lock"]
        findings.append(Finding("DeepSpeed", f"{where}: {what}", BLOCKS, hint))
    if shutil.which("ninja") is None:
        text = "ninja, which compiles the extensions, is not on PATH"
        findings.append(Finding("ninja", text, NOTE, "`source .venv/bin/activate`, or `pip install ninja`"))
    return findings


def variables(environment: Mapping[str, str], root: Path = Path("/")) -> list[Finding]:
    """Return the variables that change a run, and what is wrong with them.

    Args:
        environment: of this process.
        root: of the file system, for the network interfaces.
    """
    findings = [Finding(name, value) for name, value in shown_variables(environment).items()]
    try:
        check_environment(environment)
    except UserError as error:
        findings.append(from_error("variables", error))
    driver = gpus.driver()
    if environment.get("NCCL_P2P_DISABLE") == "1" and driver is not None and len(driver.gpus) > 1:
        text = "NCCL_P2P_DISABLE=1 disables NVLink between the GPUs of this machine"
        findings.append(Finding("NCCL", text, NOTE, "`unset NCCL_P2P_DISABLE`"))
    present = {path.name for path in root.glob("sys/class/net/*")}
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = [part.strip().removeprefix("=") for part in environment.get(name, "").split(",") if part.strip()]
        known = any(part.startswith("^") or any(real.startswith(part) for real in present) for part in wanted)
        if wanted and present and not known:
            text = f"{name}={environment[name]}: this machine has {', '.join(sorted(present))}"
            findings.append(Finding("network", text, BLOCKS, f"`unset {name}`, or name one of these"))
    return findings or [Finding("variables", "none of a launcher, NCCL, CUDA or torch is set")]


def accelerate(environment: Mapping[str, str]) -> list[Finding]:
    """Return accelerate's default configuration, and what `accelerate launch` would do with it on this machine."""
    config = default_config(environment)
    if config is None:
        return [Finding("accelerate", f"no default configuration ({default_path(environment)})")]
    if config.problem:
        text = f"{config.path} cannot be read: {config.problem}"
        return [Finding("accelerate", text, BLOCKS, config.set_aside)]
    names = ("distributed_type", "num_processes", "num_machines", "mixed_precision", "use_cpu")
    text = ", ".join(f"{name} {config.text(name)}" for name in names if config.text(name))
    findings = [Finding("accelerate", f"{config.path}: {text}")]
    machines = config.number("num_machines")
    unasked = f"`accelerate launch` without --num_machines waits for {machines} machines"
    if machines > 1:
        fix = f"pass --num_machines=1 --num_processes=N, or {config.set_aside}"
        findings.append(Finding("accelerate", unasked, NOTE, fix))
    try:
        refuse_processes(config, machines, environment)
    except UserError as error:
        findings.append(from_error("accelerate", error))
    try:
        layers = config.text(f"fsdp_config.{LAYERS_FLAG[2:]}")
        if config.text("distributed_type") == "FSDP":
            refuse_unknown_layers(layers.split(","), describe(config))
    except UserError as error:
        findings.append(from_error("accelerate", error))
    if config.text("mixed_precision") in ("fp16", "fp8"):
        text = f"mixed_precision {config.text('mixed_precision')} overflows in these models"
        findings.append(Finding("accelerate", text, NOTE, "pass --mixed_precision=bf16"))
    if config.text("use_cpu").lower() in TRUE_VALUES and gpus.driver() is not None:
        findings.append(Finding("accelerate", "use_cpu: GPUs are not used", NOTE, config.set_aside))
    return findings
