"""Tests of videox.distributed: backend selection and refusals at start, stop requests, and collectives on two ranks.

Tests with two ranks fork them with the launcher's environment variables; each rank reports by lines in its output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forkserver
import pytest
import runs
import torch
import torch.distributed as dist
from accelerate import Accelerator
from dispositions import STOP_SIGNALS, default_signals, set_defaults

from videox.distributed.accelerator import make_accelerator
from videox.distributed.backends import BACKENDS, refuse_other_launch
from videox.distributed.collectives import accumulate, gather_objects, sum_over_ranks
from videox.distributed.signals import StopRequest
from videox.distributed.step_sync import sync_step
from videox.errors import FLAGS, PEER_LOST, UserError

# --------------------------------------------------------------------------------------------------------- one process


ZERO, FSDP = {"ACCELERATE_USE_DEEPSPEED": "true"}, {"ACCELERATE_USE_FSDP": "1"}


@pytest.mark.parametrize(
    ("environment", "processes", "runs_as", "message"),
    [
        ({"WORLD_SIZE": "2"}, 1, "single", "2 processes were requested, 1 joined"),
        (ZERO, 1, "ddp", "DeepSpeed was requested, ddp would run"),
        (FSDP, 1, "single", "FSDP was requested, single would run"),
        ({"ACCELERATE_USE_FSDP": "True"}, 1, "zero2", "FSDP was requested, zero2 would run"),
        ({}, 1, "fsdp2", "neither DeepSpeed nor FSDP was requested, fsdp2 would run"),
        (ZERO, 1, "zero1", "zero1 is not supported"),
        ({}, 1, "DistributedType.XLA", "DistributedType.XLA is not supported"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            1,
            "zero2",
            "--zero_stage is 3, the DeepSpeed file has stage 2",
        ),
    ],
)
def test_a_backend_other_than_requested_is_refused(
    environment: dict[str, str], processes: int, runs_as: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        refuse_other_launch(environment, processes, runs_as)
    assert error.value.exit_code == FLAGS


@pytest.mark.parametrize("name", BACKENDS)
def test_the_requested_backend_is_accepted(name: str) -> None:
    requested = {"replicated": {"ACCELERATE_USE_FSDP": "false"}, "deepspeed": ZERO, "fsdp": FSDP}[
        BACKENDS[name].engine
    ]
    refuse_other_launch({**requested, "WORLD_SIZE": "3"}, 3, name)
    if BACKENDS[name].engine == "deepspeed":
        refuse_other_launch({**requested, "ACCELERATE_DEEPSPEED_ZERO_STAGE": name[-1]}, 1, name)


def test_one_process_runs_without_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with runs.restored_process_state():
        accelerator, backend = make_accelerator("bf16")
        assert (backend.name, backend.full_weights, accelerator.num_processes) == ("single", True, 1)
        assert accelerator.mixed_precision == "bf16"
        assert gather_objects(accelerator)({"a": 1}) == [{"a": 1}]
        assert sum_over_ranks(torch.tensor(3.0)).item() == 3
        report = sync_step(accelerator, stop=False, bad_samples=2, data_wait=0.5, stamp=2**53 - 1, busy=3.5)
        assert report == type(report)(False, 2, 0.5, (3.5,))


def test_fewer_processes_than_requested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The launcher requests two processes. Without a GPU and the variable, accelerate makes each a world of one.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with (
        runs.restored_process_state(),
        pytest.raises(UserError, match="2 processes were requested, 1 joined") as error,
    ):
        make_accelerator("no")
    assert "ACCELERATE_USE_CPU=true" in error.value.hint


# ------------------------------------------------------------------------------------------------------- stop requests


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore the handlers of this process, whatever a test sets."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    for number, handler in zip(STOP_SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_children_have_default_signals_where_the_parent_ignores_them(handlers: None) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    print_ignored = "import signal; print(*[n for n in (1, 2, 10, 15) if signal.getsignal(n) is signal.SIG_IGN])"
    command = [sys.executable, "-c", print_ignored]
    assert subprocess.check_output(command, text=True).split() == ["1", "2", "10", "15"]
    with default_signals():
        assert subprocess.check_output(command, text=True).split() == []
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_IGN] * len(STOP_SIGNALS)


def test_a_run_under_nohup_ignores_the_end_of_its_terminal(handlers: None) -> None:
    set_defaults()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop


def test_a_signal_sets_the_stop_request_and_handlers_are_restored(
    handlers: None, capfd: pytest.CaptureFixture[str]
) -> None:
    set_defaults()
    numbers = STOP_SIGNALS
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with StopRequest() as stop:
            assert not stop
            signal.raise_signal(number)  # to this thread, so the handler has run when this returns
            assert stop
            assert stop.signal_name == number.name
            signal.raise_signal(signal.SIGTERM)  # a second signal of another kind changes nothing
            signal.raise_signal(signal.SIGINT)  # nor one that a launcher forwards immediately
        assert f"{number.name}: process {os.getpid()} saves after this step" in capfd.readouterr().err
        assert [signal.getsignal(number) for number in numbers] == before


def test_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="of a step"), StopRequest():
        raise ValueError("of a step")
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------------------------- two processes


def report(name: str, value: object) -> None:
    """Print a result of this rank, for `reports_of`."""
    print("report", json.dumps([name, value]), flush=True)


def reports_of(trainer: forkserver.TrainerProcess) -> dict[str, object]:
    lines = [line.removeprefix("report ") for line in trainer.output().splitlines() if line.startswith("report ")]
    return dict(json.loads(line) for line in lines)


def join() -> tuple[Accelerator, int]:
    accelerator, backend = make_accelerator("no")
    report("backend", [backend.name, accelerator.num_processes, str(accelerator.distributed_type)])
    tensor = torch.ones(3)
    report("moved", tensor.to(accelerator.device).data_ptr() != tensor.data_ptr())
    return accelerator, accelerator.process_index


def report_collectives() -> int:
    """Entry point of each of two ranks: call every collective once and report the results."""
    accelerator, rank = join()
    gather = gather_objects(accelerator)
    report("gathered", gather({"rank": rank}))
    report("sum", sum_over_ranks(torch.tensor([1.0, rank])).tolist())
    for step, stop in ((1, False), (2, rank == 1)):
        agreed = sync_step(
            accelerator, stop=stop, bad_samples=rank + 1, data_wait=0.5 - rank / 4, stamp=2**52 + step,
            busy=1.5 + rank,
        )  # fmt: skip
        report(f"step {step}", [agreed.stop, agreed.bad_samples, agreed.data_wait, agreed.busy])
    report("gradients", _gradients_per_micro_batch(accelerator, rank))
    return 0


def _gradients_per_micro_batch(accelerator: Accelerator, rank: int) -> list[list[float]]:
    """Return the gradient of this rank after each of two micro-batches of a step; DDP reduces it in the second."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    wrapped = accelerator.prepare_model(model)
    gradients = []
    for micro, last in enumerate((False, True)):
        with accumulate(accelerator, wrapped, last):
            accelerator.backward(wrapped(torch.tensor([[10.0 * micro + rank + 1]])).sum())
        gradients.append(model.weight.grad.flatten().tolist())
    return gradients


def sync_different_steps() -> int:
    """Entry point of each of two ranks: synchronize, with rank 1 one step ahead."""
    accelerator, rank = join()
    sync_step(accelerator, stop=False, bad_samples=0, data_wait=0.0, stamp=2**53 - 1 - rank)
    return 0


def run_on_two_ranks(function: Callable[[], int], log: Path) -> list[forkserver.TrainerProcess]:
    name = f"tests.runs.test_distributed:{function.__name__}"
    return forkserver.shared().run_ranks(2, [], log, entry_points=(name, name))


def test_collectives_agree_on_two_ranks(tmp_path: Path) -> None:
    ranks = run_on_two_ranks(report_collectives, tmp_path / "log")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output()
    reports = [reports_of(rank) for rank in ranks]
    for each in reports:
        assert each["backend"] == ["ddp", 2, "DistributedType.MULTI_CPU"]
        assert not each["moved"]  # a tensor on the CPU is not copied
        assert each["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert each["sum"] == [2, 1]
        assert each["step 1"] == [False, 3, 0.5, [1.5, 2.5]]
        assert each["step 2"] == [True, 3, 0.5, [1.5, 2.5]]  # a stop request of one rank stops all
    # micro-batch 0: the inputs 1 and 2 of each rank; micro-batch 1 adds 11 and 12, then DDP takes the mean
    assert [each["gradients"] for each in reports] == [[[1], [13]], [[2], [13]]]


def test_ranks_at_different_steps_are_detected(tmp_path: Path) -> None:
    ranks = run_on_two_ranks(sync_different_steps, tmp_path / "log")
    assert [rank.code for rank in ranks] == [PEER_LOST, PEER_LOST]
    for rank in ranks:
        assert "ranks [1] are not at the step of rank 0" in rank.error_line()


def test_backend_capabilities() -> None:
    assert not dist.is_initialized()  # no test above has left a process group in this process
    assert list(BACKENDS) == ["single", "ddp", "zero2", "zero3", "fsdp1", "fsdp2"]
    assert [name for name, backend in BACKENDS.items() if not backend.full_weights] == ["zero3", "fsdp1", "fsdp2"]
    assert [name for name, backend in BACKENDS.items() if not backend.clips_by_own_norm] == ["zero2", "zero3"]
