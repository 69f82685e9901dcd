"""Serves the index: looks at many files in child processes, so that no file can hang or crash the trainer.

A decoder may hang or crash in native code, where no exception and no thread helps; the kernel's timer ends such a
child. They are plain children and not a multiprocessing pool, because each process of such a pool runs the imports of
the calling script (torch, diffusers) at its start and after each crash.
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

from videox.data.media.container import BadMedia, MediaInfo
from videox.errors import BUG, UserError

DEADLINE = 60.0  # seconds that one file may take
_GRACE = 5.0  # seconds after which a child that even the kernel could not end (a dead network disk) is abandoned
_MEMORY = 8 << 30  # bytes of address space of a child
_LONGEST = 500  # characters of a detail: an answer stays shorter than a pipe's atomic write, so it comes in one piece

Answer = MediaInfo | BadMedia


def probe_each(paths: Sequence[str], *, workers: int, deadline: float = DEADLINE) -> Iterator[tuple[int, Answer]]:
    """Yields (position in paths, answer of `videox.data.media.video.probe`) in the order in which they come.

    Args:
        paths: absolute paths.
        workers: child processes; at least 1 is used.
        deadline: seconds that one file may take.

    Yields:
        What probe returned or raised; BadMedia "timeout" and "crashed" where the child did not live to tell.

    Raises:
        UserError: exit code 70 where a child cannot start.
    """
    answers: queue.SimpleQueue[tuple[int, Answer] | int] = queue.SimpleQueue()
    positions = iter(range(len(paths)))  # shared by the threads: one next() is one step of the interpreter
    children = [_Child(deadline) for _ in range(max(1, min(workers, len(paths))))]

    def serve(number: int) -> None:
        with contextlib.closing(children[number]) as child:
            try:
                for position in positions:
                    answers.put((position, child.ask(paths[position])))
            finally:
                answers.put(number)

    with ThreadPoolExecutor(len(children)) as pool:
        serving = [pool.submit(serve, number) for number in range(len(children))]
        ended = 0
        try:
            while ended < len(children):
                answer = answers.get()
                if isinstance(answer, int):
                    serving[answer].result()
                    ended += 1
                else:
                    yield answer
        finally:
            for _ in positions:  # leaves nothing more to do for the threads that still run
                pass
            for child in children:
                child.kill()


class _Child:
    """One process that answers for file after file; the next file starts it again when one was its end."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, path: str) -> Answer:
        """Returns what probe says of a file, or how the child came to its end over it."""
        process = self._process = self._process or _start(self._deadline)
        with contextlib.suppress(BrokenPipeError):  # it has died already, which the empty answer tells as well
            os.write(_number(process.stdin), json.dumps(path).encode() + b"\n")
        line = _answer(process, self._deadline + _GRACE)
        if line:
            answer = json.loads(line)
            return MediaInfo(**answer["info"]) if "info" in answer else BadMedia(*answer["bad"])
        self._process = None
        return _bury(process, self._deadline)

    def kill(self) -> None:
        """Ends the process; a thread that waits for its answer gets an empty one."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process and returns what it holds; for the thread that asks."""
        if self._process is not None:
            self._process.kill()
            _bury(self._process, self._deadline)
            self._process = None


def serve_probes(deadline: float) -> None:
    """Runs as a child: answers each path of stdin by one line of stdout until stdin ends.

    Args:
        deadline: seconds after which the kernel ends the process over one file, even inside native code.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, which then closes stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    from videox.data.media.video import probe  # the decoders are loaded here and never by the parent

    os.write(out, b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, deadline)
        try:
            answer: dict[str, object] = {"info": asdict(probe(Path(json.loads(line))))}
        except BadMedia as bad:
            answer = {"bad": (bad.media_class, bad.detail[:_LONGEST])}
        except MemoryError:
            answer = {"bad": ("too_large", f"needs more than {_MEMORY >> 30} GiB to be looked at")}
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, json.dumps(answer).encode() + b"\n")


def _start(deadline: float) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[3])
    code = f"import sys; sys.path.insert(0, {root!r}); from videox.data.index.probe import serve_probes; "
    code += f"serve_probes({deadline!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    if _answer(process, None) != b"ready\n":
        process.kill()
        hint = "see the lines above this one; `pip install -r requirements.txt` brings the decoders"
        raise UserError("the look at the media files", f"a child process ended with {process.wait()}", hint, BUG)
    return process


def _answer(process: subprocess.Popen[bytes], seconds: float | None) -> bytes:
    """Returns the child's next line; b"" where it died or said nothing for `seconds`."""
    poll = select.poll()  # select() itself cannot take the high file numbers of a big training process
    poll.register(_number(process.stdout), select.POLLIN)
    if not poll.poll(None if seconds is None else seconds * 1000):
        return b""
    return os.read(_number(process.stdout), select.PIPE_BUF)


def _bury(process: subprocess.Popen[bytes], deadline: float) -> BadMedia:
    """Ends a child that gave no answer, and returns what that says of its file."""
    try:
        status = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:  # asleep in the kernel, for instance on a dead network disk
        process.kill()
        status = -signal.SIGALRM
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    if status == -signal.SIGALRM:
        return BadMedia("timeout", f"no answer within {deadline:g} s")
    cause = f"signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"exit code {status}"
    return BadMedia("crashed", f"the process that looked at it ended with {cause}")


def _number(pipe: IO[bytes] | None) -> int:
    if pipe is None:
        raise TypeError("the child was started without this pipe")
    return pipe.fileno()
