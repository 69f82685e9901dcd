"""Memory of running trainers, and the encoder files that they have mapped; used by cache.py and the tests."""

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

import launches
import runs
import tiny
from transformers import UMT5Config, UMT5EncoderModel

# Freed memory returns to the system at once, as it does for the large tensors of a published encoder.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
PAUSE = 0.1  # seconds between two readings
SHARED = "/memfd:videox"  # the memory that videox.models.shared_memory stores a cast encoder in
TEXT_ENCODER = {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 8, "num_heads": 16}


class Memory(NamedTuple):
    """Anonymous and shared memory of the processes of a launch, in bytes; shared pages count proportionally.

    peaks: peak of each process; peak: peak of the sum over processes; resident: median of that sum after the first
    step; named: encoder files, and memory shared by processes, that were mapped after the first step.
    """

    peaks: tuple[int, ...]
    peak: int
    resident: int
    named: frozenset[str]


def held_by(pid: int) -> int:
    """Return the bytes of a process that no file backs; shared memory counts with the process's proportional part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def mapped_by(pid: int, folders: Sequence[Path]) -> set[str]:
    """Return the files below these folders that a process has mapped, and SHARED if it has mapped that."""
    paths = {line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    below = {path for path in paths if any(path.startswith(f"{folder}/") for folder in folders)}
    return below | {SHARED for path in paths if path.startswith(SHARED)}


def start(flags: Sequence[str], world_size: int, log: Path) -> list[subprocess.Popen]:
    """Start the processes of a launch, each in its own interpreter; output goes to `log` plus "-<rank>"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = launches.launcher_environment("ddp" if world_size > 1 else "plain", "wan2.1 normal", world_size)
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", **MALLOC}
    variables |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    ranks = []
    for rank in range(world_size):
        environment = runs.child_environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank))
        with log.with_name(f"{log.name}-{rank}").open("w") as output:
            command = [sys.executable, runs.WAN_SCRIPT, *flags]
            ranks.append(subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=output, stderr=output))
    return ranks


def memory_of(flags: Sequence[str], output_dir: Path, folders: Sequence[Path], world_size: int) -> Memory:
    """Train, and read the memory of the processes until all have ended.

    Args:
        flags: flags of the trainer.
        output_dir: folder of the run; training has begun when it contains metrics.jsonl.
        folders: folders of the encoders.
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
                with suppress(ProcessLookupError, FileNotFoundError):  # the process has just ended
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
    """Write a small Wan2.1 with a comparatively large text encoder; return its folder and the encoder's bytes.

    The bytes are those of the weights in bfloat16, in which a run computes; the file stores float32.
    """
    model = tiny.build_wan_t2v(folder, text_dim=TEXT_ENCODER["d_model"])
    config = UMT5Config.from_pretrained(model / "text_encoder")
    config.update(TEXT_ENCODER)
    encoder = UMT5EncoderModel(config)
    encoder.save_pretrained(model / "text_encoder")
    return model, 2 * sum(parameter.numel() for parameter in encoder.parameters())
