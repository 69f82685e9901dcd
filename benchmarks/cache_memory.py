"""Serves benchmarks/cache.py and the tests: the memory of running trainers, and which encoders they hold in it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import runs
import test_backends
import tiny
from transformers import UMT5Config, UMT5EncoderModel

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed goes at once, as tensors of a large encoder do
PAUSE = 0.1  # seconds between two looks
SHARED = "/memfd:videox"  # what videox.models.shared_memory puts a cast encoder into
TEXT_ENCODER = {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 8, "num_heads": 16}


class Memory(NamedTuple):
    """What the processes of a launch held that no file backs, in bytes, shared memory by its part.

    peaks: of each process; peak: of all at once; resident: of all at once, the median after the first step;
    named: the encoders' files, and memory shared by processes, that were mapped after it.
    """

    peaks: tuple[int, ...]
    peak: int
    resident: int
    named: frozenset[str]


def held_by(pid: int) -> int:
    """Returns the bytes of a process that no file backs, of memory that it shares its proportional part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def mapped_by(pid: int, folders: Sequence[Path]) -> set[str]:
    """Returns which files below these folders a process has mapped, and SHARED if it has that."""
    paths = {line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    below = {path for path in paths if any(path.startswith(f"{folder}/") for folder in folders)}
    return below | {SHARED for path in paths if path.startswith(SHARED)}


def start(flags: Sequence[str], world_size: int, log: Path) -> list[subprocess.Popen]:
    """Starts the processes of a launch, each an interpreter of its own; what they say goes to files beside `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = test_backends.variables("ddp" if world_size > 1 else "plain", "wan2.1 normal", world_size)
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", **GIVEN_BACK}
    told |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    ranks = []
    for rank in range(world_size):
        environment = runs.environment(**told, RANK=str(rank), LOCAL_RANK=str(rank))
        with log.with_name(f"{log.name}-{rank}").open("w") as said:
            command = [sys.executable, runs.WAN, *flags]
            ranks.append(subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=said, stderr=said))
    return ranks


def memory_of(flags: Sequence[str], output_dir: Path, folders: Sequence[Path], world_size: int) -> Memory:
    """Trains, and looks at the processes again and again until all have ended.

    Args:
        flags: of the trainer.
        output_dir: of the run, whose metrics.jsonl says when training has begun.
        folders: of the encoders.
        world_size: number of processes.
    """
    log = output_dir.with_name(f"{output_dir.name}.log")
    ranks = start(flags, world_size, log)
    peaks, peak, trained, named = [0] * len(ranks), 0, list[int](), set[str]()
    deadline = time.monotonic() + runs.TIME_LIMIT
    try:
        while any(rank.poll() is None for rank in ranks):
            held, trains = [0] * len(ranks), (output_dir / "metrics.jsonl").exists()
            for number, rank in enumerate(ranks):
                with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                    held[number] = held_by(rank.pid)
                    named |= mapped_by(rank.pid, folders) if trains else set()
            peaks = [max(pair) for pair in zip(peaks, held, strict=True)]
            peak = max(peak, sum(held))
            trained += [sum(held)] if trains and all(held) else []
            if time.monotonic() > deadline:
                raise TimeoutError(f"{output_dir} runs for more than {runs.TIME_LIMIT} s")
            time.sleep(PAUSE)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        raise SystemExit(log.with_name(f"{log.name}-0").read_text()[-3000:])
    return Memory(tuple(peaks), peak, int(median(trained)) if trained else 0, frozenset(named))


def build_model(folder: Path) -> tuple[Path, int]:
    """Writes a small Wan2.1 whose text encoder weighs far more than all else; returns it and the encoder's bytes.

    The bytes are those of the weights in bfloat16, in which a run computes; they are stored in float32.
    """
    model = tiny.build_wan_t2v(folder, text_dim=TEXT_ENCODER["d_model"])
    config = UMT5Config.from_pretrained(model / "text_encoder")
    config.update(TEXT_ENCODER)
    encoder = UMT5EncoderModel(config)
    encoder.save_pretrained(model / "text_encoder")
    return model, 2 * sum(parameter.numel() for parameter in encoder.parameters())
