"""Tests of videox.device and videox.tracking.gpu_memory: times of the phases of a step, and memory."""

from __future__ import annotations

import pytest
import torch

from videox.device import DeviceEvent, PhaseTimes, Span, memory_phase, seconds_by_phase
from videox.distributed.step_sync import StepReport
from videox.tracking.gpu_memory import GIB, GpuMemory
from videox.tracking.pending_step import PendingStep, step_scalars

CPU = torch.device("cpu")


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def work(clock: Clock, name: str, *parts: object) -> None:
    """Run a phase of parts: seconds that pass, or (name, ...) of a phase inside."""
    with memory_phase(name):
        for part in parts:
            if isinstance(part, tuple):
                work(clock, *part)
            else:
                clock.time += float(part)  # type: ignore[arg-type]


def test_a_phase_has_its_own_time_without_the_phases_inside_it() -> None:
    clock = Clock()
    times = PhaseTimes(CPU, clock)
    work(clock, "the VAE", 100.0)  # before: not measured
    with times.active():
        for _ in range(2):
            work(clock, "the VAE", 2.0)
            work(clock, "the text encoder", 0.5)
            clock.time += 7.0  # in no phase
            work(clock, "the forward pass", 3.0, ("the backward pass", 6.0), 0.25)
        work(clock, "the optimizer step", 0.125)
        spans = times.take()
        work(clock, "a save", 50.0)
        assert [span.name for span in times.take()] == ["a save"]
    work(clock, "the VAE", 100.0)  # after: not measured
    assert times.take() == []
    assert seconds_by_phase(spans) == {
        "the VAE": 4.0, "the text encoder": 1.0, "the forward pass": 6.5, "the backward pass": 12.0,
        "the optimizer step": 0.125,
    }  # fmt: skip
    one = torch.ones(())
    step = PendingStep(
        1, None, 0, StepReport(False, 0, 0.0), 1e-3, False, step_scalars(one, one, one > 0, one), 30.0, 0.0, None, None, spans  # type: ignore[arg-type]
    )  # fmt: skip
    assert step.parts() == {
        "encode_seconds": 5.0, "forward_seconds": 6.5, "backward_seconds": 12.0, "optimizer_seconds": 0.125,
    }  # fmt: skip


def test_a_phase_that_fails_ends_and_names_itself() -> None:
    clock = Clock()
    times = PhaseTimes(CPU, clock)
    with times.active():
        with pytest.raises(torch.OutOfMemoryError) as error, memory_phase("the forward pass"):
            clock.time += 1.0
            with memory_phase("the VAE"):
                clock.time += 2.0
                raise torch.OutOfMemoryError("no memory")
        work(clock, "the optimizer step", 4.0)
    assert error.value.phase == "the VAE"
    assert seconds_by_phase(times.take()) == {"the forward pass": 1.0, "the VAE": 2.0, "the optimizer step": 4.0}


class GpuEvent:
    """A CUDA event that notes who waits for it."""

    waited = 0

    def __init__(self, at: float) -> None:
        self.at = at

    def synchronize(self) -> None:
        GpuEvent.waited += 1

    def elapsed_time(self, other: GpuEvent) -> float:
        return 1000 * (other.at - self.at)


def test_times_of_a_finished_step_are_read_without_a_wait() -> None:
    first, second = DeviceEvent(CPU), DeviceEvent(CPU)
    first._event, second._event = GpuEvent(1.0), GpuEvent(3.5)  # type: ignore[assignment]
    GpuEvent.waited = 0
    assert seconds_by_phase([Span("the VAE", first, second, -1)]) == {"the VAE": 2.5}
    assert GpuEvent.waited == 0
    assert second.since(first) == 2.5 and GpuEvent.waited == 1


def test_memory_is_compared_with_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 60 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 64 * GIB)
    memory = GpuMemory(torch.device("cuda", 0), 57.0 * GIB)
    assert memory.measure() == {"peak_allocated_gib": 60.0, "peak_reserved_gib": 64.0, "predicted_gib": 57.0}
    assert memory.line() == "GPU memory so far: peak 60.0 GiB allocated, 64.0 GiB reserved; predicted 57.0 GiB (-5%)"
