"""The line that names the machine under a table of figures."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Return the processor's name from /proc/cpuinfo, or its architecture."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_line(*packages: str) -> str:
    """Return processor, cores and versions in one line; `packages`: names as pip knows them."""
    versions = [f"{name} {version(name).split('+')[0]}" for name in packages]
    return f"{os.cpu_count()}-core {processor()}, CPU only; {', '.join([*versions, f'Python {platform.python_version()}'])}"
