"""The process of gpu.py that measures one case at a time; when it ends, it is restarted for the next case.

This is a separate module so that the child process, which is spawned, can import it by name.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import diffusers
import torch

from gpu.checks import checks
from gpu.full_step import flags, step
from gpu.layers import attention, blocks, ceilings
from gpu.models import memory, transfers, vae
from gpu.scales import Case, Scale, Values, attempt
from gpu.smoke import smoke

# In the order in which they run: what decides whether a first training works, then what decides its flags.
PARTS: dict[str, Callable[[Scale], Iterator[Case]]] = {
    part.__name__: part
    for part in (ceilings, smoke, step, memory, flags, checks, attention, blocks, vae, transfers)
}  # fmt: skip
NOT_FINISHED = "not finished"
START = 300.0  # seconds until a new process must be ready


def cases(scale: Scale, sections: Collection[str]) -> list[Case]:
    """Return the cases of some sections, in the order in which they run."""
    return [case for name, part in PARTS.items() if name in sections for case in part(scale)]


def serve(pipe: Any, scale: Scale, device: str) -> None:  # noqa: ANN401 - a multiprocessing connection
    """Measure the probes whose numbers (of the case, and in it) arrive through the pipe, until it sends None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    diffusers.utils.logging.set_verbosity_error()
    known, place = cases(scale, PARTS), torch.device(device)
    pipe.send(None)
    while (numbers := pipe.recv()) is not None:
        case, probe = numbers
        outcome = attempt(list(known[case].probes())[probe].measure, place)
        gc.collect()
        if place.type == "cuda":
            torch.cuda.synchronize(place)  # an unrecoverable CUDA error ends the process here
            torch.cuda.empty_cache()
        pipe.send(outcome)


@contextmanager
def variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside, which new processes inherit."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Measurer:
    """A process that measures one case at a time, and is restarted after it has ended."""

    def __init__(self, scale: Scale, device: str) -> None:
        self.scale, self.device = scale, device
        self._cases = cases(scale, PARTS)
        self._environment: Mapping[str, str] = {}
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is None and self._process is not None and self._process.is_alive():
            self._pipe.send(None)
            self._process.join(10)
        self.end()

    def measure(
        self, number: int, budget: float, meanwhile: Callable[[], object] = lambda: None, end: float = math.inf
    ) -> tuple[Values, str]:
        """Return the values of a case, or no values and the reason.

        Args:
            number: of the case, among those of all parts.
            budget: seconds that the measurements may take, without the start of the process.
            meanwhile: called during the first measurement.
            end: time.monotonic() at which the case ends in any case.
        """
        case, found, limit = self._cases[number], [], time.monotonic() + budget
        for place, probe in enumerate(case.probes()):
            if self._process is not None and self._environment != probe.environment:
                self.end()
            if self._process is None:
                begun = time.monotonic()
                with variables(probe.environment):
                    self._start()
                limit += time.monotonic() - begun
                self._environment = probe.environment
            self._pipe.send((number, place))
            meanwhile()
            values, reason = self._receive(max(min(limit, end) - time.monotonic(), 0.0), budget)
            if reason:
                return {}, reason
            found.append(values)
        return case.conclude(found), ""

    def _receive(self, remaining: float, budget: float) -> tuple[Values, str]:
        if not self._pipe.poll(remaining):
            self.end()
            return {}, f"{NOT_FINISHED} within its budget of {budget:.0f} s"
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self.end()
            return {}, f"the process ended with {code}"

    def _start(self) -> None:
        context = get_context("spawn")  # a forked child cannot use CUDA once its parent has
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.scale, self.device), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START):
            self.end()
            raise TimeoutError(f"the measuring process was not ready after {START:.0f} s")
        try:
            self._pipe.recv()
        except EOFError as error:
            self._process.join()
            code = self._process.exitcode
            self.end()
            raise ChildProcessError(f"the measuring process ended with {code} before it was ready") from error

    def end(self) -> None:
        """End the process, which frees the memory of the device."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
