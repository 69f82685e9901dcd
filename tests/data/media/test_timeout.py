"""Serves videox/data/media/timeout.py: what takes too long ends, what does not is left alone, and no timer stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from videox.data.media.container import BadMedia
from videox.data.media.timeout import time_limit


def test_what_takes_too_long_is_a_bad_sample() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(BadMedia, match=r"not read within 0\.05 seconds") as late, time_limit(0.05, own_process=False):
        while True:
            time.sleep(0.01)
    assert late.value.media_class == "unreadable"
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("own_process", [True, False])
def test_what_is_quick_is_left_alone(own_process: bool) -> None:
    with time_limit(0.2, own_process=own_process):
        value = sum(range(1000))
    time.sleep(0.5)
    assert value == 499500


def test_other_errors_pass_and_the_timer_is_gone() -> None:
    with pytest.raises(ValueError, match="mine"), time_limit(5, own_process=False):
        raise ValueError("mine")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_hang_that_holds_the_interpreter_ends_a_reading_process() -> None:
    """ctypes.PyDLL keeps the interpreter's lock during the call, and no signal ends the wait for a locked mutex."""
    code = "\n".join(
        [
            "import ctypes",
            "from videox.data.media.timeout import time_limit",
            "mutex, lock = ctypes.create_string_buffer(128), ctypes.PyDLL(None).pthread_mutex_lock",
            "with time_limit(0.3, own_process=True):",
            "    lock(mutex), lock(mutex)",
        ]
    )
    begin = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, env=dict(os.environ)
    )
    assert run.returncode == 1
    assert "Timeout" in run.stderr
    assert time.monotonic() - begin < 40
