"""Time and memory of planning an epoch of a million rows from a saved index.

    python benchmarks/plan.py [--json OUT] [--rows N] [--runs N]

A fresh process maps an index file of N rows (four fifths videos, common sizes, 1 to 900 frames), plans epoch 0 of the
published Wan2.1 command (256 to 1024 pixels, 81 frames at stride 3, token size 512), and computes the micro-batches of
the step at nine tenths of the epoch; once for each value of --slot_fill. Memory is the process's peak; it includes
pages of the mapped index, which the system can drop and which are also listed separately.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
from cost import cost_coefficients
from machine import machine_line

from videox.data.index.index import Index, MediaColumns, load_index
from videox.data.index.table import DECLARED, MEASURED, SCHEMA, VERSION, fingerprint_of, write_table
from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import count_steps, plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings

POLICY = SizePolicy(
    video_sample_size=256, image_sample_size=1024, token_sample_size=512, n_frames=81, stride=3,
    enable_bucket=True, random_hw_adapt=True, token_length=True,
)  # fmt: skip
COST = cost_coefficients(dim=5120, ffn_dim=13824, layers=40, text_tokens=512)  # Wan2.1 14B
SIZES = ((1920, 1080), (1080, 1920), (1280, 720), (720, 1280), (640, 480), (1024, 1024), (854, 480))
SLOTS, RANK = 64, 3


def save_index(path: Path, rows: int) -> None:
    """Write an index file as a finished scan writes it; the media files need not exist."""
    rng = np.random.default_rng(0)
    kind = (rng.random(rows) < 0.8).astype(np.uint8)
    size = np.array(SIZES)[rng.integers(0, len(SIZES), rows)]
    index = Index.from_columns(
        MediaColumns(
            kind=kind,
            width=size[:, 0],
            height=size[:, 1],
            frames=np.where(kind == 1, rng.integers(1, 900, rows), 1),
            fps=np.where(kind == 1, 24.0, 0.0),
        ),
        usable=rng.random(rows) < 0.99,
        file_path=[f"clips/{row // 1000:04d}/{row:07d}.mp4" for row in range(rows)],
        text=[f"clip {row} of a bright square that moves over a dark background" for row in range(rows)],
    )
    columns = {name: getattr(index, name) for name in ("file_path", "text", "detail", "problem", *MEASURED)}
    columns |= {name: getattr(index, name.removeprefix("declared_")) for name in DECLARED}
    table = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
    write_table(table, {"version": VERSION, "notes": [], "fingerprint": fingerprint_of(table)}, path)


def resident(name: str) -> float:
    """Return a value of /proc/self/status in MiB; unlike getrusage's it does not include the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def plan_once(path: Path, slot_fill: str) -> dict[str, float]:
    """Map, plan, compute the micro-batches of a late step and count steps, each timed; run it in a fresh process."""
    begin = time.perf_counter()
    index = load_index(path, Path())
    columns = PlanColumns(index.kind, index.width, index.height, index.frames, index.usable)
    settings = PlanSettings(POLICY, 1, SLOTS, 42, slot_fill=slot_fill, cost_linear=COST[0], cost_quadratic=COST[1])
    mapped = time.perf_counter()
    plan = plan_epoch(columns, settings, 0)
    planned = time.perf_counter()
    plan.micro_batches(plan.n_steps * 9 // 10, RANK, SLOTS)
    reached = time.perf_counter()
    peak, mapped_pages = resident("VmHWM"), resident("RssFile")
    steps = count_steps(columns, settings, 1)
    counted = time.perf_counter()
    return {
        "samples": len(plan.row), "steps": plan.n_steps, "steps_of_next_epoch": steps, "map_s": mapped - begin,
        "plan_s": planned - mapped, "reach_s": reached - planned, "count_s": counted - reached, "peak_mib": peak,
        "mapped_mib": mapped_pages,
    }  # fmt: skip


def measure(path: Path, slot_fill: str, runs: int) -> dict[str, object]:
    """Return the medians over fresh processes, for memory the maximum."""
    command = [sys.executable, __file__, "--only", slot_fill, "--index", str(path)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(runs)
    ]
    row: dict[str, object] = {"slot_fill": slot_fill}
    for name in found[0]:
        values = [each[name] for each in found]
        row[name] = round(max(values), 1) if name.endswith("_mib") else round(statistics.median(values), 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the index (default: 1,000,000)")
    parser.add_argument("--runs", type=int, default=5, help="fresh processes for each slot fill (default: 5)")
    parser.add_argument("--only", choices=("fixed", "cost"), help="plan once, print the figures as JSON, and exit")
    parser.add_argument("--index", type=Path, help="the index file for --only")
    options = parser.parse_args()
    if options.only:
        return print(json.dumps(plan_once(options.index, options.only)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.json.videox-index.arrow"
        save_index(path, options.rows)
        megabytes = path.stat().st_size / 1e6
        rows = [measure(path, slot_fill, options.runs) for slot_fill in ("fixed", "cost")]
    print(
        f"{options.rows} rows, index of {megabytes:.0f} MB, median of {options.runs} fresh processes. {machine_line('numpy')}."
    )
    heads = list(rows[0])
    print(" | ".join(heads))
    for row in rows:
        print(" | ".join(str(row[head]).ljust(len(head)) for head in heads))
    if options.json:
        figures = {"machine": machine_line("numpy"), "rows": options.rows, "runs": options.runs, "figures": rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
