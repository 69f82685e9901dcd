"""Tests of videox.training.memory_check: an out-of-memory error names the phase in which it was raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import diffusers
import pytest
import runs
import tiny
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import videox.training.build
import videox.training.memory_check
from videox.device import memory_phase
from videox.distributed import collectives
from videox.engine.ddp import DdpEngine
from videox.errors import FLAGS, UserError
from videox.shapes import USUAL, Bucket
from videox.training.checkpointing import Checkpointer
from videox.training.memory_advice import OTHERWISE, MemoryAdvice
from videox.training.memory_check import explain_oom, name_batch, peak_line, try_batch

QUICK = {"max_train_steps": 1, "num_train_epochs": None, "validation_rows": 1, "gradient_checkpointing": False}


class Place(NamedTuple):
    """Where torch.OutOfMemoryError is raised (owner, name), and the phase that the line must name."""

    owner: Any
    name: str
    phase: str


PLACES = (
    Place(diffusers.AutoencoderKLWan, "encode", "the VAE"),
    Place(transformers.UMT5EncoderModel, "forward", "the text encoder"),
    Place(videox.training.build, "load_transformer", "loading the model"),
    Place(videox.training.build, "choose_trainable", "placing weights and optimizer"),
    Place(diffusers.WanTransformer3DModel, "forward", "validation"),
    Place(DdpEngine, "update", "the optimizer step"),
    Place(DdpEngine, "save", "a save"),
    Place(Checkpointer, "_export_final", "the export"),
)  # fmt: skip
BATCH: Any = {"bucket": Bucket(5, 32, 48), "rows": [0, 1]}
ALSO_IN_TEST = ("the VAE",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("oom")
    return tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data")


def raise_oom(*arguments: object, **settings: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Make a method run out of memory in its first call; the advice, which is computed after it, may call it again."""

    def fail(*arguments: object, **settings: object) -> None:
        monkeypatch.undo()
        raise_oom()

    monkeypatch.setattr(owner, name, fail)


def message_of(outcome: runs.Outcome) -> tuple[str, list[str]]:
    """Return the error line of a run and the lines below it; there is nothing else, such as a traceback."""
    assert outcome.code == FLAGS, outcome.stderr
    assert outcome.stderr.count("error: ") == 1 and "Traceback" not in outcome.stderr
    line, *details = outcome.stderr[outcome.stderr.index("error: ") :].splitlines()
    assert all(text.startswith("  ") for text in details) and len(details) <= 12
    assert outcome.status["error"] == line
    return line, details


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, id=p.phase, marks=[] if p.phase in ALSO_IN_TEST else pytest.mark.slow) for p in PLACES],
)
def test_the_phase_is_named_with_what_to_change(
    place: Place, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, place.owner, place.name)
    flags = {**QUICK, "gpu_memory": 1.4}  # the CUDA context alone takes 1.4 GiB
    line, details = message_of(runs.train(runs.wan_flags(*files, tmp_path / "out", **flags)))
    assert f"GPU memory: out of memory (OOM) in {place.phase}" in line and "2.00 GiB" in line
    assert "Fix: train smaller or shorter samples" in line
    assert details[0].startswith("  estimate for these flags: 1.") and "GPU: 1.4 GiB (of --gpu_memory)" in details[0]
    assert "none of the changes that were tried makes it fit; the smallest found:" in details[1]
    assert any(" GiB  " in text for text in details[2:]) and "context parallelism" in details[-1], details


@pytest.mark.slow
def test_a_run_that_should_have_fitted_needs_less(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proposed flags need less memory in the phase that ran out of it; other phases have their own advice."""
    flags = {**QUICK, "gpu": "rtx4090", "validation_rows": 0}
    for number, (owner, name, phase) in enumerate(
        ((torch.Tensor, "backward", "the backward pass"), (Checkpointer, "_export_final", "the export"))
    ):
        fail_once(monkeypatch, owner, name)
        line, details = message_of(runs.train(runs.wan_flags(*files, tmp_path / str(number), **flags)))
        assert f"in {phase}" in line and "GPU: 24.0 GiB (of --gpu rtx4090)" in details[0]
        if phase == "the export":
            assert f"Fix: {OTHERWISE}" in line and "the export is not part of the estimate" in details[1]
        else:
            assert "of the micro-batch 1 x " in line and "it is too low for this run" in details[1]


def test_an_estimate_that_fails_is_named(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videox.training.memory_check, "RunMemory", dict)  # cannot be built of these arguments
    monkeypatch.setattr(DdpEngine, "update", raise_oom)
    line, details = message_of(runs.train(runs.wan_flags(*files, tmp_path / "out", **QUICK)))
    assert "in the optimizer step" in line and f"Fix: {OTHERWISE}" in line
    assert len(details) == 1 and "the memory of this run cannot be estimated: TypeError: dict expected" in details[0]


@pytest.mark.slow
def test_loading_a_checkpoint_is_named(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runs.train(runs.wan_flags(*files, tmp_path / "out", **QUICK))
    assert first.code == 0, first.stderr
    fail_once(monkeypatch, DdpEngine, "load")
    flags = {**QUICK, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    line, details = message_of(runs.train(runs.wan_flags(*files, tmp_path / "out", **flags)))
    assert "out of memory (OOM) in loading the checkpoint" in line
    assert "80.0 GiB (assumed without --gpu and --gpu_memory)" in details[0]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["the forward pass", "the backward pass"])
def test_a_pass_is_named_with_its_micro_batch(
    phase: str, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = (diffusers.WanTransformer3DModel, "forward") if "forward" in phase else (torch.Tensor, "backward")
    fail_once(monkeypatch, owner, name)
    flags = {**QUICK, "validation_rows": 0}
    line, _ = message_of(runs.train(runs.wan_flags(*files, tmp_path / "out", **flags)))
    assert f"out of memory (OOM) in {phase} of the micro-batch 1 x " in line


def test_the_innermost_phase_counts_and_the_type_stays() -> None:
    with pytest.raises(torch.OutOfMemoryError) as error, memory_phase("validation"), memory_phase("the VAE"):
        raise_oom()
    assert error.value.phase == "the VAE"
    with (
        pytest.raises(UserError) as refused,
        explain_oom(MemoryAdvice()),
        name_batch(BATCH, USUAL),
        memory_phase("the backward pass"),
    ):
        raise_oom()
    assert "in the backward pass of the micro-batch 2 x 5 x 32 x 48 (24 tokens)" in refused.value.what
    assert refused.value.details == ("the memory of this run cannot be estimated: the plan: was not made yet",)
    with (
        pytest.raises(ValueError, match="other"),
        explain_oom(MemoryAdvice()),
        name_batch(BATCH, USUAL),
        memory_phase("the VAE"),
    ):
        raise ValueError("other errors pass")


def test_the_backward_pass_has_its_own_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", raise_oom)
    with runs.restored_process_state():
        accelerator, model = runs.Accelerator(cpu=True), torch.nn.Linear(2, 1)
        with pytest.raises(torch.OutOfMemoryError) as error, collectives.accumulate(accelerator, model, True):
            collectives.backward(accelerator, model, model(torch.ones(2)).sum())
    assert error.value.phase == "the backward pass"


def test_the_measured_peak_is_beside_the_predicted_one() -> None:
    assert peak_line(3.0 * 2**30, 4 * 2**30) == "4.00 GiB of tensors at the peak (3.00 GiB predicted, -25.0%)"
    assert peak_line(3.0 * 2**30, None) == "the peak is not measured on a CPU (3.00 GiB predicted)"
    assert peak_line("no profile", 2**30) == "1.00 GiB of tensors at the peak (no prediction: no profile)"


class NvmeEngine:
    """What try_batch uses of ZeRO-3 with weights and moments on NVMe, where the fp32 parameters cannot be read."""

    moments_on_host = True

    def __init__(self) -> None:
        self.model = torch.nn.Linear(2, 2)

    def fp32_params(self) -> NoReturn:
        raise UserError("--use_ema", "the DeepSpeed file keeps the weights on NVMe", "offload to cpu")

    def zero_grad(self) -> None:
        self.model.zero_grad()


def test_weights_on_nvme_are_not_read_for_moments_on_the_host() -> None:
    ran: list[Any] = []
    try_batch(NvmeEngine(), BATCH, ran.append, moment_bytes=0)  # type: ignore[arg-type]
    assert ran == [BATCH]


@pytest.mark.filterwarnings("error")
def test_only_the_generators_of_the_own_device_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = torch.random.fork_rng

    def fork_rng(devices: Any = None) -> Any:
        asked.append(devices)
        return real(devices=[])  # there is no GPU here

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    engine: Any = NvmeEngine()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        try_batch(engine, BATCH, lambda batch: torch.randn(3), moment_bytes=0)
        assert torch.equal(torch.get_rng_state(), before)
    with FakeTensorMode():
        engine.model = torch.nn.Module()
        engine.model.weight = torch.nn.Parameter(torch.empty(2, device="cuda:3"))
    try_batch(engine, BATCH, lambda batch: None, moment_bytes=0)
    assert asked == [[], [], [torch.device("cuda", 3)]]
