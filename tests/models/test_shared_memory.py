"""Serves machines with several processes: a frozen encoder is the same in each of them, and in memory once."""

from __future__ import annotations

import ctypes
import json
import sys
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
from videox.models.component import Component
from videox.models.folder import load_strictly
from videox.models.shared_memory import load_frozen, stored_dtype

CLASSES = {"text_encoder": UMT5EncoderModel, "vae": AutoencoderKLWan}
WORLD = 2
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
SPARE = 30_000_000  # bytes for what two processes import and keep beside the weights


def held() -> int:
    """Returns the bytes that no file backs and that are this process's own: of shared ones its proportional part."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    parts = [line.split() for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    assert len(parts) == 2
    return 1024 * sum(int(part[1]) for part in parts)


def values_of(model: torch.nn.Module) -> dict[str, list]:
    """Returns dtype and sum of each tensor, and what a text encoder makes of a text."""
    found = {name: [str(tensor.dtype), tensor.double().sum().item()] for name, tensor in model.state_dict().items()}
    if isinstance(model, UMT5EncoderModel):
        with torch.no_grad():
            found["text"] = model(torch.tensor([[5, 6, 7, 1]])).last_hidden_state.flatten().tolist()
    return found


def examine() -> int:
    """Loads frozen models in one of several processes and writes what they are and how much memory they take."""
    folder, out, names, shared = json.loads(sys.argv[1])
    accelerator, _ = make_accelerator("bf16")
    gather = gather_objects(accelerator)
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 131072)  # so that what is freed is not kept for later
    before = held()
    if shared:
        models = [
            load_frozen(CLASSES[n], Component(Path(folder) / n, {}), torch.bfloat16, pinned=False, gather=gather)
            for n in names
        ]
    else:
        models = [load_strictly(CLASSES[n], Path(folder) / n, dtype=torch.bfloat16) for n in names]
    gather(None)  # all have loaded, none has left
    taken = held() - before
    gather(None)
    values = [values_of(model) for model in models]
    mapped = "memfd:videox" in Path("/proc/self/maps").read_text(encoding="utf-8")
    descriptors = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    report = {"values": values, "taken": taken, "mapped": mapped, "open": sum("memfd" in name for name in descriptors)}
    Path(f"{out}-{accelerator.process_index}.json").write_text(json.dumps(report))
    return 0


def examined(folder: Path, out: Path, names: list[str], *, shared: bool = True) -> list[dict]:
    """Returns what the processes of one machine found, by rank."""
    ranks = forkserver.shared().start_ranks(
        WORLD,
        [json.dumps([str(folder), str(out), names, shared])],
        out.with_suffix(".log"),
        entry_points=["tests.models.test_shared_memory:examine"] * WORLD,
        environment=launcher_environment("ddp", "wan2.1 normal", WORLD),
    )
    for rank in ranks:
        rank.wait()
    assert [rank.code for rank in ranks] == [0] * WORLD, "\n".join(rank.output()[-4000:] for rank in ranks)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(WORLD)]


def test_every_process_has_what_from_pretrained_gives(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model")
    found = examined(folder, tmp_path / "found", [*CLASSES])
    wanted = [load_strictly(model_class, folder / name, dtype=torch.bfloat16) for name, model_class in CLASSES.items()]
    values = [values_of(model) for model in wanted]
    assert [rank["values"] for rank in found] == [values] * WORLD
    assert [rank["mapped"] for rank in found] == [True] * WORLD


def test_weights_used_as_they_are_stored_stay_in_their_file(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model")
    UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "stored" / "text_encoder"
    )
    assert stored_dtype(folder / "text_encoder") == torch.float32
    assert stored_dtype(tmp_path / "stored" / "text_encoder") == torch.bfloat16
    assert stored_dtype(tmp_path) is None
    found = examined(tmp_path / "stored", tmp_path / "found", ["text_encoder"])
    assert [rank["mapped"] for rank in found] == [False] * WORLD
    assert found[0]["values"] == found[1]["values"]


@pytest.mark.slow
def test_an_encoder_that_is_cast_takes_its_memory_once_for_all(tmp_path: Path) -> None:
    config = UMT5Config(vocab_size=8000, d_model=1024, d_kv=64, d_ff=2816, num_layers=4, num_heads=16)
    encoder = UMT5EncoderModel(config)
    size = 2 * sum(parameter.numel() for parameter in encoder.parameters())  # in bfloat16
    assert size > 100_000_000
    encoder.save_pretrained(tmp_path / "model" / "text_encoder", max_shard_size="100MB")
    del encoder
    shared = examined(tmp_path / "model", tmp_path / "shared", ["text_encoder"])
    apart = examined(tmp_path / "model", tmp_path / "apart", ["text_encoder"], shared=False)
    assert shared[0]["values"] == shared[1]["values"] == apart[0]["values"]
    together, twice = (sum(rank["taken"] for rank in ranks) for ranks in (shared, apart))
    print(f"{size / 1e6:.0f} MB in bfloat16: {together / 1e6:.0f} MB shared, {twice / 1e6:.0f} MB apart")
    assert twice > 2 * size
    assert size < together < size + SPARE
    assert together < twice - 0.9 * size
