"""The process of gpu.py that measures one case at a time; when it ends, it is restarted for the next case.

This is a separate module so that the child process, which is spawned, can import it by name.
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from multiprocessing import get_context
from typing import Any

import diffusers
import torch
from gpu_layers import attention, blocks, ceilings
from gpu_models import encoders, memory, transfers
from gpu_scales import Case, Scale, Values, measured

PARTS = {part.__name__: part for part in (ceilings, memory, blocks, attention, encoders, transfers)}
START = 300.0  # seconds until a new process must be ready


def cases(scale: Scale, sections: Collection[str]) -> list[Case]:
    """Return the cases of some sections, the most important sections first."""
    return [case for name, part in PARTS.items() if name in sections for case in part(scale)]


def serve(pipe: Any, scale: Scale, device: str) -> None:  # noqa: ANN401 - a multiprocessing connection
    """Measure the cases whose numbers arrive through the pipe, until it sends None."""
    diffusers.utils.logging.set_verbosity_error()
    known, place = cases(scale, PARTS), torch.device(device)
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        outcome = measured(known[number], place)
        gc.collect()
        if place.type == "cuda":
            torch.cuda.synchronize(place)  # an unrecoverable CUDA error ends the process here
            torch.cuda.empty_cache()
        pipe.send(outcome)


class Measurer:
    """A process that measures one case at a time, and is restarted after it has ended."""

    def __init__(self, scale: Scale, device: str) -> None:
        self.scale, self.device = scale, device
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is not None and self._process.is_alive():
            self._pipe.send(None)
            self._process.join(10)
        self._end()

    def measure(self, number: int, budget: float) -> tuple[Values, str]:
        """Return the values of a case, or no values and the reason, after at most `budget` seconds."""
        if self._process is None:
            self._start()
        self._pipe.send(number)
        if not self._pipe.poll(budget):
            self._end()
            return {}, f"not finished within its budget of {budget:.0f} s"
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._end()
            return {}, f"the process ended with {code}"

    def _start(self) -> None:
        context = get_context("spawn")  # a forked child cannot use CUDA once its parent has
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.scale, self.device), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START):
            self._end()
            raise TimeoutError(f"the measuring process was not ready after {START:.0f} s")
        try:
            self._pipe.recv()
        except EOFError as error:
            self._process.join()
            code = self._process.exitcode
            self._end()
            raise ChildProcessError(f"the measuring process ended with {code} before it was ready") from error

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
