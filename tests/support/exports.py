"""Helpers for tests of scripts/export.py and of conversions: run the script, read headers, measure peak memory."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
import runs
import tiny
from safetensors import safe_open

from videox.errors import UserError


def export(*words: object) -> int:
    """Run scripts/export.py with these command-line words; return its exit code."""
    return tiny.load_script("scripts/export.py").main([str(word) for word in words])


def refusal(*words: object) -> str:
    """Run scripts/export.py with words that it must refuse; return the error line."""
    with pytest.raises(UserError) as refused:
        export(*words)
    assert refused.value.hint and "\n" not in refused.value.line()
    return refused.value.line()


def header(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def peak_anonymous(arguments: list[str]) -> int:
    """Run a command and return its peak of anonymous memory in bytes, sampled every millisecond."""
    process = subprocess.Popen(arguments, cwd=tiny.ROOT, env=runs.child_environment(), stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            with contextlib.suppress(OSError):
                if match := re.search(r"RssAnon:\s+(\d+) kB", status.read_text()):
                    peak = max(peak, int(match[1]) * 1024)
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait(120)
    done.set()
    sampler.join()
    assert code == 0
    return peak
