"""Probing of media files in child processes, so that no file can hang or crash the trainer.

A decoder may hang or crash in native code, where exceptions and threads do not help. So each child probes one file at
a time, and a kernel timer kills a child that takes too long. The children are plain processes and not a
multiprocessing pool: each process of such a pool would run the imports of the calling script (torch, diffusers) at its
start and again after each crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO

from videox.data.media.container import BadMedia, MediaInfo, bad_media_of
from videox.errors import BUG, UserError

PROBE_SECONDS = 60.0  # time limit for one file
# After the time limit and this time, a child that the kernel could not kill (dead network disk) is abandoned.
_GRACE_SECONDS = 5.0
_MAX_MEMORY = 8 << 30  # bytes of address space of a child
# Characters of a detail. A line then stays shorter than the atomic write of a pipe (PIPE_BUF) and is never split.
_MAX_DETAIL = 500

ProbeResult = MediaInfo | BadMedia


def probe_each(
    paths: Sequence[str], *, workers: int, timeout: float = PROBE_SECONDS
) -> Iterator[tuple[int, ProbeResult]]:
    """Yield (position in paths, result of `videox.data.media.video.probe`), in order of completion.

    Args:
        paths: absolute paths.
        workers: child processes; at least 1 is used.
        timeout: time limit for one file, in seconds.

    Yields:
        What probe returned or raised; BadMedia "timeout" or "crashed" where the child ended without a result.

    Raises:
        UserError: exit code 70 if a child cannot start.
    """
    results: queue.SimpleQueue[tuple[int, ProbeResult] | int] = queue.SimpleQueue()
    # Shared by the threads without a lock: next() of a range iterator is atomic under the GIL.
    positions = iter(range(len(paths)))
    children = [_Child(timeout) for _ in range(max(1, min(workers, len(paths))))]

    def run_child(number: int) -> None:
        with contextlib.closing(children[number]) as child:
            try:
                for position in positions:
                    results.put((position, child.probe(paths[position])))
            finally:
                results.put(number)

    with ThreadPoolExecutor(len(children)) as pool:
        threads = [pool.submit(run_child, number) for number in range(len(children))]
        ended = 0
        try:
            while ended < len(children):
                result = results.get()
                if isinstance(result, int):
                    threads[result].result()
                    ended += 1
                else:
                    yield result
        finally:
            # Also reached when the caller closes the generator: exhaust the positions, so that the threads end, and
            # kill the children, so that no thread waits for a result.
            for _ in positions:
                pass
            for child in children:
                child.kill()


class _Child:
    """A child process that probes one file after another; it is restarted for the next file if a file ended it."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None

    def probe(self, path: str) -> ProbeResult:
        """Return the child's result for a file, or how the child ended while probing it."""
        process = self._process = self._process or _start(self._timeout)
        # A broken pipe means that the child is dead, which the empty line below shows as well.
        with contextlib.suppress(BrokenPipeError):
            os.write(_fileno(process.stdin), json.dumps(path).encode() + b"\n")
        line = _read_line(process, self._timeout + _GRACE_SECONDS)
        if line:
            result = json.loads(line)
            return MediaInfo(**result["info"]) if "info" in result else BadMedia(*result["bad"])
        self._process = None
        return _reap(process, self._timeout)

    def kill(self) -> None:
        """Kill the process; a thread that waits for its result reads an empty line."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kill the process and close its pipes; called by the thread that uses this child."""
        if self._process is not None:
            self._process.kill()
            _reap(self._process, self._timeout)
            self._process = None


def serve_probes(timeout: float) -> None:
    """Run as a child process: for each path read from stdin, write one line to stdout, until stdin ends.

    Args:
        timeout: seconds after which the kernel kills the process over one file, even inside native code.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent; _start blocked it until here
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # stdout becomes stderr, so that what a library prints is not read as a result.
    out = os.dup(1)
    os.dup2(2, 1)
    from videox.data.media.video import probe  # imported here, so that the parent never loads the decoders

    os.write(out, b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            result: dict[str, object] = {"info": asdict(probe(Path(json.loads(line))))}
        except BadMedia as bad:
            result = {"bad": (bad.media_class, bad.detail[:_MAX_DETAIL])}
        except MemoryError:
            result = {"bad": ("too_large", f"probing it needs more than {_MAX_MEMORY >> 30} GiB of memory")}
        except Exception as error:  # noqa: BLE001 - the error is reported with the file
            problem = bad_media_of(error)
            result = {"bad": (problem.media_class, problem.detail[:_MAX_DETAIL])}
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, json.dumps(result).encode() + b"\n")


def _start(timeout: float) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[3])
    code = f"import sys; sys.path.insert(0, {root!r}); from videox.data.index.probe import serve_probes; "
    code += f"serve_probes({timeout!r})"
    # Ctrl-C is sent to all processes of a terminal: the child inherits the mask, and does not end while it starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if _read_line(process, None) != b"ready\n":
        process.kill()
        hint = "see the lines above this one; `pip install -r requirements.txt` installs the decoders"
        raise UserError("probing of the media files", f"a child process ended with {process.wait()}", hint, BUG)
    return process


def _read_line(process: subprocess.Popen[bytes], seconds: float | None) -> bytes:
    """Return the child's next line; b"" if it died or wrote nothing for `seconds`."""
    poll = select.poll()  # select() itself fails for file descriptors of 1024 and above, which a training process has
    poll.register(_fileno(process.stdout), select.POLLIN)
    if not poll.poll(None if seconds is None else seconds * 1000):
        return b""
    return os.read(_fileno(process.stdout), select.PIPE_BUF)


def _reap(process: subprocess.Popen[bytes], timeout: float) -> BadMedia:
    """Wait for a child that gave no result, killing it if needed, and return the problem of its file."""
    try:
        status = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:  # blocked in the kernel, for example on a dead network disk
        process.kill()
        status = -signal.SIGALRM
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    if status == -signal.SIGALRM:
        return BadMedia("timeout", f"not probed within {timeout:g} s")
    cause = f"signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"exit code {status}"
    return BadMedia("crashed", f"the process that probed it ended with {cause}")


def _fileno(pipe: IO[bytes] | None) -> int:
    if pipe is None:
        raise TypeError("the child was started without this pipe")
    return pipe.fileno()
