"""What a LoRA of Wan2.1 14B needs on 16 and 24 GB by item, and what copies cost: benchmarks/small_card_fits.md.

    python benchmarks/small_card_fits.py [--output benchmarks/small_card_fits.md]

Every row is a dry run of scripts/wan2.1/train.py for an RTX 4090 and an RTX 3090; nothing is measured on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from recipes import GIB, train_script

from videox.estimate.gpus import GPUS

FAMILY = "wan2.1"
CARDS, GPU_NAMES = (16, 24), ("rtx4090", "rtx3090")
SIZES = {  # frames, height and width -> flags of the data and of the sample
    "81x480x832": "--dry_run_data 100x6s@16fps:832x480 --fix_sample_size 480 832 --video_sample_n_frames 81",
    "49x512x512": "--dry_run_data 100x6s@16fps:512x512 --fix_sample_size 512 512 --video_sample_n_frames 49",
}
COMMON = (
    "--dry_run --enable_bucket --dry_run_model wan2.1-t2v-14b --video_sample_fps 16 --mixed_precision bf16 --train_batch_size 1 --lora_rank 32 --gradient_checkpointing --low_vram "
    "--text_encoder_precision nf4 --max_train_steps 1000 --host_memory 1000 --gpu_memory 1000"
)
SHOWN = COMMON.partition(" --max_train_steps")[0].partition("--mixed_precision bf16 ")[2]
ROWS = (
    "", "--offload_activations", "--offload_activations --base_precision int8", "--offload_activations --base_precision nf4",
    "--offload_activations --stream_blocks all", "--offload_activations --stream_blocks all --base_precision int8",
    "--offload_activations --stream_blocks all --base_precision nf4",
)  # fmt: skip
ITEMS = ("weights", "gradients", "optimizer", "activations", "communication", "context", "fragments")


def report_of(size: str, flags: str, gpu: str) -> dict[str, Any]:
    """Return plan_report.json of a dry run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = (
            f"{COMMON} {SIZES[size]} {flags} --gpu {gpu} --output_dir {folder} --latent_cache {folder}/cache".split()
        )
        code = train_script(FAMILY).main(words)
        if code != 0:
            raise RuntimeError(f"the dry run of {flags} ended with {code}")
        report: dict[str, Any] = json.loads((Path(folder) / "plan_report.json").read_text(encoding="utf-8"))
        found = {"x".join(str(bucket[side]) for side in ("frames", "height", "width")) for bucket in report["buckets"]}
        if found != {size}:
            raise RuntimeError(f"the dry run of {size} trains {', '.join(sorted(found))}")
    return report


def bus_seconds(report: dict[str, Any], gpu: str) -> float:
    """Return the time of the copies of the weights in a step: each streamed block in both passes."""
    copied = 2 * report["memory"]["host"].get("streamed blocks", 0)
    return float(copied / GPUS[gpu].host_bandwidth)


def lines_of(size: str) -> Iterator[str]:
    """Yield the table of a size."""
    yield f"## {size}\n"
    gpus = " | ".join(f"{gpu}: s per step | weights copied in" for gpu in GPU_NAMES)
    yield f"| flags | {' | '.join(ITEMS)} | total GiB | {' | '.join(f'{card} GiB' for card in CARDS)} | host GiB | {gpus} |"
    yield "| --- |" + " --- |" * (len(ITEMS) + 1 + len(CARDS) + 1 + 2 * len(GPU_NAMES))
    for flags in ROWS:
        reports = {gpu: report_of(size, flags, gpu) for gpu in GPU_NAMES}
        first = reports[GPU_NAMES[0]]
        memory = first["memory"]
        cells = [f"`{flags}`" if flags else "none", *(f"{memory[item] / GIB:.2f}" for item in ITEMS)]
        cells += [f"{memory['total'] / GIB:.1f}", *(verdict(memory["total"], card) for card in CARDS)]
        cells.append(f"{first['host'] / GIB:.0f}")
        for gpu, report in reports.items():
            cells += [f"{report['seconds']['step']:.1f}", f"{bus_seconds(report, gpu):.1f}"]
        yield f"| {' | '.join(cells)} |"


def verdict(total: float, card: int) -> str:
    """Return whether it fits in so many GiB, and what is missing."""
    missing = total / GIB - card
    return "fits" if missing <= 0 else f"{missing:.1f} too much"


def page() -> str:
    """Return the page."""
    parts = [
        "# A LoRA of Wan2.1 14B on 16 and 24 GB\n\nWritten by `python benchmarks/small_card_fits.py --output "
        "benchmarks/small_card_fits.md` from dry runs; not measured on a GPU. Text-to-video,\nrank 32, one sample per step, GiB "
        f"of 2^30 bytes. All rows have\n`{SHOWN}` and a latent cache "
        "that the same card fills.\nThe items are those of a training step. Copies run beside the computation: the time of a step has what "
        "of them is longer than\nwhat hides it."
    ]
    return "\n\n".join([*parts, *("\n".join(lines_of(size)) for size in SIZES)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the page to this file, too")
    args = parser.parse_args()
    text = page()
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
