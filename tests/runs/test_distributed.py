"""Serves whoever must trust several processes to stay one run: what they agree on, and what is refused at the start.

The parts with two processes are forked with the launcher's variables; each answers by lines in its output.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import forkserver
import pytest
import runs
import torch
import torch.distributed as dist
from accelerate import Accelerator

from videox.distributed.accelerator import (
    BACKENDS,
    StopRequest,
    accumulate,
    gather_objects,
    make_accelerator,
    refuse_other_launch,
    sum_over_ranks,
)
from videox.distributed.step_sync import agree
from videox.errors import FLAGS, PEER_LOST, UserError

# ------------------------------------------------------------------------------------------ one process


ZERO, FSDP = {"ACCELERATE_USE_DEEPSPEED": "true"}, {"ACCELERATE_USE_FSDP": "1"}


@pytest.mark.parametrize(
    ("environment", "processes", "runs_as", "said"),
    [
        ({"WORLD_SIZE": "2"}, 1, "single", "2 processes asked for, 1 joined"),
        (ZERO, 1, "ddp", "DeepSpeed was asked for, ddp would run"),
        (FSDP, 1, "single", "FSDP was asked for, single would run"),
        ({"ACCELERATE_USE_FSDP": "True"}, 1, "zero2", "FSDP was asked for, zero2 would run"),
        ({}, 1, "fsdp2", "neither DeepSpeed nor FSDP was asked for, fsdp2 would run"),
        (ZERO, 1, "zero1", "zero1 is not supported"),
        ({}, 1, "DistributedType.XLA", "DistributedType.XLA is not supported"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            1,
            "zero2",
            "--zero_stage 3, but the DeepSpeed file says stage 2",
        ),
    ],
)
def test_what_was_not_asked_for_is_refused(
    environment: dict[str, str], processes: int, runs_as: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        refuse_other_launch(environment, processes, runs_as)
    assert refused.value.exit_code == FLAGS


@pytest.mark.parametrize("name", BACKENDS)
def test_what_was_asked_for_is_not(name: str) -> None:
    asked = {"whole": {"ACCELERATE_USE_FSDP": "false"}, "zero": ZERO, "fsdp": FSDP}[BACKENDS[name].kind]
    refuse_other_launch({**asked, "WORLD_SIZE": "3"}, 3, name)
    if BACKENDS[name].kind == "zero":
        refuse_other_launch({**asked, "ACCELERATE_DEEPSPEED_ZERO_STAGE": name[-1]}, 1, name)


def test_one_process_is_named_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with runs.untouched_process():
        accelerator, backend = make_accelerator("bf16")
        assert (backend.name, backend.whole_weights, accelerator.num_processes) == ("single", True, 1)
        assert accelerator.mixed_precision == "bf16"
        assert gather_objects(accelerator)({"a": 1}) == [{"a": 1}]
        assert sum_over_ranks(torch.tensor(3.0)).item() == 3
        report = agree(accelerator, stop=False, bad_samples=2, data_wait=0.5, stamp=2**53 - 1, busy=3.5)
        assert report == type(report)(False, 2, 0.5, (3.5,))


def test_more_processes_asked_for_than_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The launcher says two, and accelerate, without a GPU and without the variable, makes one of each.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with runs.untouched_process(), pytest.raises(UserError, match="2 processes asked for, 1 joined") as refused:
        make_accelerator("no")
    assert "ACCELERATE_USE_CPU=true" in refused.value.hint


# ------------------------------------------------------------------------------------------- stop request


def test_a_request_to_stop_is_noted_and_handlers_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    for number in numbers:  # whatever started the tests, nohup for instance, may have them ignored
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with StopRequest() as stop:
            assert not stop
            signal.raise_signal(number)  # to this thread, so that it is noted when this returns
            assert stop
            assert stop.signal_name == number.name
            signal.raise_signal(signal.SIGTERM)  # a second one of another kind changes nothing
            signal.raise_signal(signal.SIGINT)  # nor one that a launcher passes on at once
        assert f"{number.name}: process {os.getpid()} saves after this step" in capfd.readouterr().err
        assert [signal.getsignal(number) for number in numbers] == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="of a step"), StopRequest():
        raise ValueError("of a step")
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------------ two processes


def answer(name: str, value: object) -> None:
    print("answer", json.dumps([name, value]), flush=True)


def answers(trainer: forkserver.Trainer) -> dict[str, object]:
    lines = [line.removeprefix("answer ") for line in trainer.said().splitlines() if line.startswith("answer ")]
    return dict(json.loads(line) for line in lines)


def joined() -> tuple[Accelerator, int]:
    accelerator, backend = make_accelerator("no")
    answer("backend", [backend.name, accelerator.num_processes, str(accelerator.distributed_type)])
    there = torch.ones(3)
    answer("moved", there.to(accelerator.device).data_ptr() != there.data_ptr())
    return accelerator, accelerator.process_index


def say_what_is_agreed() -> int:
    """Runs in each of two processes: every collective of the module once."""
    accelerator, rank = joined()
    gather = gather_objects(accelerator)
    answer("gathered", gather({"rank": rank}))
    answer("sum", sum_over_ranks(torch.tensor([1.0, rank])).tolist())
    for step, stop in ((1, False), (2, rank == 1)):
        report = agree(
            accelerator, stop=stop, bad_samples=rank + 1, data_wait=0.5 - rank / 4, stamp=2**52 + step,
            busy=1.5 + rank,
        )  # fmt: skip
        answer(f"report {step}", [report.stop, report.bad_samples, report.data_wait, report.busy])
    answer("whole", _gradients_are_reduced_at_the_last(accelerator, rank))
    return 0


def _gradients_are_reduced_at_the_last(accelerator: Accelerator, rank: int) -> list[list[float]]:
    """Returns this process's gradient after each of two micro-batches of a step, DDP's mean in the second."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    wrapped = accelerator.prepare_model(model)
    gradients = []
    for micro, last in enumerate((False, True)):
        with accumulate(accelerator, wrapped, last):
            accelerator.backward(wrapped(torch.tensor([[10.0 * micro + rank + 1]])).sum())
        gradients.append(model.weight.grad.flatten().tolist())
    return gradients


def pair_wrongly() -> int:
    """Runs in each of two processes: rank 1 is a step ahead."""
    accelerator, rank = joined()
    agree(accelerator, stop=False, bad_samples=0, data_wait=0.0, stamp=2**53 - 1 - rank)
    return 0


def both(work: Callable[[], int], log: Path) -> list[forkserver.Trainer]:
    name = f"tests.runs.test_distributed:{work.__name__}"
    return forkserver.shared().run_ranks(2, [], log, work=(name, name))


def test_two_processes_agree(tmp_path: Path) -> None:
    ranks = both(say_what_is_agreed, tmp_path / "log")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].said()
    heard = [answers(rank) for rank in ranks]
    for each in heard:
        assert each["backend"] == ["ddp", 2, "DistributedType.MULTI_CPU"]
        assert not each["moved"]  # what is on the processor already
        assert each["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert each["sum"] == [2, 1]
        assert each["report 1"] == [False, 3, 0.5, [1.5, 2.5]]
        assert each["report 2"] == [True, 3, 0.5, [1.5, 2.5]]  # one wish to stop is everybody's
    # micro-batch 0: own inputs 1 and 2; micro-batch 1 adds 11 and 12, then the mean of both processes
    assert [each["whole"] for each in heard] == [[[1], [13]], [[2], [13]]]


def test_processes_at_other_steps_find_out(tmp_path: Path) -> None:
    ranks = both(pair_wrongly, tmp_path / "log")
    assert [rank.code for rank in ranks] == [PEER_LOST, PEER_LOST]
    for rank in ranks:
        assert "ranks [1] are not at the step of rank 0" in rank.complaint()


def test_every_backend_says_what_it_can() -> None:
    assert not dist.is_initialized()  # nothing above has left a process group in this process
    assert list(BACKENDS) == ["single", "ddp", "zero2", "zero3", "fsdp1", "fsdp2"]
    assert [name for name, backend in BACKENDS.items() if not backend.whole_weights] == ["zero3", "fsdp1", "fsdp2"]
    assert [name for name, backend in BACKENDS.items() if not backend.clips_by_own_norm] == ["zero2", "zero3"]
