"""Tests of videox.models.shared_memory: a frozen encoder is equal in all processes, and once in memory per machine."""

from __future__ import annotations

import ctypes
import json
import sys
from functools import partial
from pathlib import Path

import forkserver
import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan
from launches import launcher_environment
from transformers import UMT5Config, UMT5EncoderModel

from videox.distributed.accelerator import make_accelerator
from videox.distributed.collectives import gather_objects
from videox.models.configured import Component
from videox.models.folder import load_strictly
from videox.models.quantised_text import prepare_quantised, quantise_text_encoder
from videox.models.shared_memory import load_frozen, stored_dtype
from videox.models.streamed_blocks import stream_blocks

CLASSES = {"text_encoder": UMT5EncoderModel, "vae": AutoencoderKLWan}
WORLD = 2
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
SPARE = 30_000_000  # bytes that two processes may allocate in addition to the weights, for imports and buffers


def private_bytes() -> int:
    """Return this process's anonymous memory in bytes, with its proportional share of shared memory."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    parts = [line.split() for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    assert len(parts) == 2
    return 1024 * sum(int(part[1]) for part in parts)


def values_of(model: torch.nn.Module) -> dict[str, list]:
    """Return dtype and sum of each tensor, and a text encoder's output for a text."""
    reports = {name: [str(tensor.dtype), tensor.double().sum().item()] for name, tensor in model.state_dict().items()}
    if isinstance(model, UMT5EncoderModel):
        with torch.no_grad():
            reports["text"] = model(torch.tensor([[5, 6, 7, 1]])).last_hidden_state.flatten().tolist()
    return reports


def quantise(precision: str, model: torch.nn.Module, fill: bool) -> None:
    if fill:
        quantise_text_encoder(model, precision, torch.bfloat16, torch.device("cpu"))
    else:
        prepare_quantised(model, precision, torch.bfloat16)


def load_and_report() -> int:
    """Entry point of a rank: load frozen models and write their values and memory use to a file."""
    folder, out, names, shared, precision = json.loads(sys.argv[1])
    accelerator, _ = make_accelerator("bf16")
    gather = gather_objects(accelerator)
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 131072)  # freed memory is returned to the system at once
    before = private_bytes()
    if shared:
        load = partial(
            load_frozen, pinned=False, gather=gather, change=partial(quantise, precision) if precision else None
        )
        models = [load(CLASSES[n], Component(Path(folder) / n, {}), torch.bfloat16) for n in names]
    else:
        models = [load_strictly(CLASSES[n], Path(folder) / n, dtype=torch.bfloat16) for n in names]
    gather(None)  # measure while all processes have loaded their models and none has ended
    used = private_bytes() - before
    gather(None)
    values = [values_of(model) for model in models]
    mapped = "memfd:videox" in Path("/proc/self/maps").read_text(encoding="utf-8")
    descriptors = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    report = {"values": values, "taken": used, "mapped": mapped, "open": sum("memfd" in name for name in descriptors)}
    Path(f"{out}-{accelerator.process_index}.json").write_text(json.dumps(report))
    return 0


def load_in_ranks(
    folder: Path, out: Path, names: list[str], *, shared: bool = True, precision: str = ""
) -> list[dict]:
    """Return the reports of the processes of one machine, by rank."""
    ranks = forkserver.shared().start_ranks(
        WORLD,
        [json.dumps([str(folder), str(out), names, shared, precision])],
        out.with_suffix(".log"),
        entry_points=["tests.models.test_shared_memory:load_and_report"] * WORLD,
        environment=launcher_environment("ddp", "wan2.1 normal", WORLD),
    )
    for rank in ranks:
        rank.wait()
    assert [rank.code for rank in ranks] == [0] * WORLD, "\n".join(rank.output()[-4000:] for rank in ranks)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(WORLD)]


def test_every_process_has_the_weights_of_from_pretrained(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model")
    reports = load_in_ranks(folder, tmp_path / "found", [*CLASSES])
    models = [load_strictly(model_class, folder / name, dtype=torch.bfloat16) for name, model_class in CLASSES.items()]
    values = [values_of(model) for model in models]
    assert [rank["values"] for rank in reports] == [values] * WORLD
    assert [rank["mapped"] for rank in reports] == [True] * WORLD


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_text_encoder_is_quantised_by_one_process_of_a_machine(tmp_path: Path, precision: str) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model")
    reports = load_in_ranks(folder, tmp_path / "found", ["text_encoder"], precision=precision)
    model = load_strictly(UMT5EncoderModel, folder / "text_encoder", dtype=torch.float32)
    quantise(precision, model, fill=True)
    assert [rank["values"] for rank in reports] == [[values_of(model)]] * WORLD
    assert [rank["mapped"] for rank in reports] == [True] * WORLD


def test_weights_in_their_stored_dtype_stay_mapped_from_their_file(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model")
    UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "stored" / "text_encoder"
    )
    assert stored_dtype(folder / "text_encoder") == torch.float32
    assert stored_dtype(tmp_path / "stored" / "text_encoder") == torch.bfloat16
    assert stored_dtype(tmp_path) is None
    reports = load_in_ranks(tmp_path / "stored", tmp_path / "found", ["text_encoder"])
    assert [rank["mapped"] for rank in reports] == [False] * WORLD
    assert reports[0]["values"] == reports[1]["values"]


@pytest.mark.slow
def test_a_cast_encoder_is_in_memory_once_per_machine(tmp_path: Path) -> None:
    config = UMT5Config(vocab_size=8000, d_model=1024, d_kv=64, d_ff=2816, num_layers=4, num_heads=16)
    encoder = UMT5EncoderModel(config)
    size = 2 * sum(parameter.numel() for parameter in encoder.parameters())  # in bfloat16
    assert size > 100_000_000
    encoder.save_pretrained(tmp_path / "model" / "text_encoder", max_shard_size="100MB")
    del encoder
    shared = load_in_ranks(tmp_path / "model", tmp_path / "shared", ["text_encoder"])
    separate = load_in_ranks(tmp_path / "model", tmp_path / "apart", ["text_encoder"], shared=False)
    assert shared[0]["values"] == shared[1]["values"] == separate[0]["values"]
    total_shared, total_separate = (sum(rank["taken"] for rank in ranks) for ranks in (shared, separate))
    print(
        f"{size / 1e6:.0f} MB in bfloat16: {total_shared / 1e6:.0f} MB shared, {total_separate / 1e6:.0f} MB separate"
    )
    assert total_separate > 2 * size
    assert size < total_shared < size + SPARE
    assert total_shared < total_separate - 0.9 * size


def stream_and_report() -> int:
    """Entry point of a rank: stream four blocks of 32 MB and write outputs and memory use to a file."""
    (out,) = json.loads(sys.argv[1])
    accelerator, _ = make_accelerator("bf16")
    gather = gather_objects(accelerator)
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 131072)
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(4096, 4096, dtype=torch.bfloat16).requires_grad_(False) for _ in range(4)]
    x = torch.randn(1, 4096, dtype=torch.bfloat16)
    gather(None)
    before = private_bytes()
    expected = [block(x) for block in blocks]
    stream = stream_blocks(blocks, range(4), torch.device("cpu"), gather)
    with torch.no_grad():
        equal = all(torch.equal(block(x), output) for block, output in zip(blocks, expected, strict=True))
    gather(None)
    used = private_bytes() - before
    gather(None)
    report = {"equal": equal, "taken": used, "bytes": stream.bytes}
    Path(f"{out}-{accelerator.process_index}.json").write_text(json.dumps(report))
    return 0


@pytest.mark.slow
def test_streamed_weights_are_once_in_the_memory_of_a_machine(tmp_path: Path) -> None:
    """Before, each process has 128 MB; then both together have these, and each two buffers of 32 MB."""
    out = tmp_path / "streamed"
    ranks = forkserver.shared().start_ranks(
        WORLD,
        [json.dumps([str(out)])],
        out.with_suffix(".log"),
        entry_points=["tests.models.test_shared_memory:stream_and_report"] * WORLD,
        environment=launcher_environment("ddp", "wan2.1 normal", WORLD),
    )
    assert [rank.wait() for rank in ranks] == [0] * WORLD, [rank.output()[-3000:] for rank in ranks]
    reports = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(WORLD)]
    assert all(report["equal"] for report in reports)
    size = reports[0]["bytes"]
    assert 4 * 2 * 4096**2 <= size < 4.01 * 2 * 4096**2
    change = sum(report["taken"] for report in reports)
    expected = size - WORLD * size + WORLD * size / 2  # shared ones, the processes' own, and the buffers
    assert abs(change - expected) < SPARE
