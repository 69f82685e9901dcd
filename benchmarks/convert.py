"""Time and memory of converting a ZeRO-3 checkpoint, compared with DeepSpeed's own scripts.

    python benchmarks/convert.py [--millions N ...] [--ranks N] [--rounds N] [--json OUT]

Writes a ZeRO-3 checkpoint with Adam's moments. In each round each converter converts it once, in its own process: this
project's `scripts/zero_to_bf16.py`, and DeepSpeed's zero_to_torch (bfloat16) and zero_to_fp32 (float32).
"work" is the CPU time minus that of the same converter on a checkpoint of one parameter, i.e. without imports.
Anonymous memory is what the machine must have free; pages of mapped or cached files can be dropped. The values of both
bfloat16 converters must be bit-identical.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import torch
from machine import machine_line
from safetensors import safe_open
from shard_maker import write_zero

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 1500  # a weight has WIDTH x WIDTH elements; with its bias 2.25 million
OURS, TORCH, FP32 = "zero_to_bf16", "deepspeed zero_to_torch bf16", "deepspeed zero_to_fp32"
SHARDS = ["--max_shard_size", "80GB", "--safe_serialization"]
WAYS: dict[str, list[str]] = {
    OURS: [str(ROOT / "scripts" / "zero_to_bf16.py"), *SHARDS],
    TORCH: ["-m", "deepspeed.utils.zero_to_torch", "--dtype", "bf16", *SHARDS],
    FP32: ["-m", "deepspeed.utils.zero_to_fp32", *SHARDS],
}


def make(folder: Path, millions: int, ranks: int) -> Path:
    """Write a checkpoint of at least this many million parameters (0: one parameter)."""
    torch.manual_seed(0)
    group = {"one.weight": torch.ones(1)}
    for layer in range(-(-millions * 10**6 // (WIDTH * WIDTH + WIDTH))):
        group |= {f"blocks.{layer}.weight": torch.randn(WIDTH, WIDTH), f"blocks.{layer}.bias": torch.randn(WIDTH)}
    return write_zero(folder, [group], stage=3, world=ranks, moments=True)


def run(way: str, checkpoint: Path, output: Path) -> dict[str, float]:
    """Convert once; return wall and CPU seconds, and the peaks of resident and anonymous memory in MiB."""
    command = [sys.executable, *WAYS[way], str(checkpoint), str(output)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    shutil.rmtree(output, ignore_errors=True)
    before, begin = os.times(), time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peaks = {"RssAnon": 0.0, "VmHWM": 0.0}
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for name in peaks:
            if found := re.search(rf"{name}:\s+(\d+) kB", status):
                peaks[name] = max(peaks[name], int(found[1]) / 1024)
        time.sleep(0.002)
    wall, after = time.perf_counter() - begin, os.times()
    if process.returncode:
        sys.exit(f"error: {way} ended with {process.returncode}: {process.stderr.read()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu, "anonymous": peaks["RssAnon"], "resident": peaks["VmHWM"]}


def same_values(first: Path, second: Path) -> bool:
    """Return whether two folders contain the same tensors, bit for bit."""
    with (
        safe_open(next(first.glob("*.safetensors")), framework="pt") as a,
        safe_open(next(second.glob("*.safetensors")), framework="pt") as b,
    ):
        if set(a.keys()) != set(b.keys()):
            return False
        return all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118


def measure(folder: Path, millions: int, ranks: int, rounds: int) -> list[dict[str, object]]:
    """Return a row per converter: medians of the rounds, largest memory, speed relative to DeepSpeed's bfloat16."""
    checkpoint, one = make(folder / "checkpoint", millions, ranks), make(folder / "one", 0, ranks)
    # Memory is measured in every round; time is not in the first one, which fills the page cache for all converters.
    outputs = {way: folder / f"output-{number}" for number, way in enumerate(WAYS)}
    start: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way, output in outputs.items():
            start[way].append(run(way, one, output)["cpu"])
            found[way].append(run(way, checkpoint, output))
    equal = same_values(outputs[OURS], outputs[TORCH])
    medians = {
        way: {key: statistics.median(row[key] for row in rows[1:]) for key in ("wall", "cpu")}
        for way, rows in found.items()
    }
    return [
        {
            "parameters": f"{millions}M x {ranks} ranks",
            "way": way,
            "wall_s": round(medians[way]["wall"], 2),
            "cpu_s": round(medians[way]["cpu"], 2),
            "work_cpu_s": round(medians[way]["cpu"] - statistics.median(start[way][1:]), 2),
            "times_as_fast": round(medians[TORCH]["wall"] / medians[way]["wall"], 2),
            "anonymous_mib": round(max(row["anonymous"] for row in rows)),
            "resident_mib": round(max(row["resident"] for row in rows)),
            "equal_values": equal if way in (OURS, TORCH) else "",
        }
        for way, rows in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--millions", type=int, nargs="+", default=[126], help="parameters, in millions (default: 126)"
    )
    parser.add_argument(
        "--ranks", type=int, default=8, help="ranks that the checkpoint is sharded across (default: 8)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one warm-up round (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for millions in options.millions:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), millions, options.ranks, options.rounds)
    print(f"{options.rounds} rounds, {machine_line('torch', 'deepspeed')}")
    heads = list(rows[0])
    print(" | ".join(heads))
    for row in rows:
        print(" | ".join(str(row[head]).ljust(len(head)) for head in heads))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
