"""Serves the benchmarks' tables: names the machine that a figure was read on, alike in all of them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Returns the processor's name as the kernel tells it, else its architecture."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_line(*packages: str) -> str:
    """Returns processor, cores and versions in a line; `packages` are named as they are installed."""
    versions = [f"{name} {version(name).split('+')[0]}" for name in packages]
    return f"{os.cpu_count()}-core {processor()}, CPU only; {', '.join([*versions, f'Python {platform.python_version()}'])}"
