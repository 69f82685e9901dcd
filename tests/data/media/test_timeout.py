"""Tests of videox.data.media.timeout: slow code is aborted, other code is not affected, and no timer stays active."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from videox.data.media.container import BadMedia
from videox.data.media.timeout import time_limit


def test_slow_code_raises_bad_media() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(BadMedia, match=r"not read within 0\.05 seconds") as caught,
        time_limit(0.05, own_process=False),
    ):
        while True:
            time.sleep(0.01)
    assert caught.value.media_class == "unreadable"
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("own_process", [True, False])
def test_fast_code_is_not_affected(own_process: bool) -> None:
    with time_limit(0.2, own_process=own_process):
        value = sum(range(1000))
    time.sleep(0.5)
    assert value == 499500


def test_other_errors_pass_and_cancel_the_timer() -> None:
    with pytest.raises(ValueError, match="another error"), time_limit(5, own_process=False):
        raise ValueError("another error")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_hang_with_the_gil_held_kills_a_reading_process() -> None:
    """ctypes.PyDLL holds the GIL during the call, and no signal interrupts the wait for a locked mutex."""
    code = "\n".join(
        [
            "import ctypes",
            "from videox.data.media.timeout import time_limit",
            "mutex, lock = ctypes.create_string_buffer(128), ctypes.PyDLL(None).pthread_mutex_lock",
            "with time_limit(0.3, own_process=True):",
            "    lock(mutex), lock(mutex)",
        ]
    )
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, env=dict(os.environ)
    )
    assert process.returncode == 1
    assert "Timeout" in process.stderr
    assert time.monotonic() - start < 40
