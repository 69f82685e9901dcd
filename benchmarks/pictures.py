"""Pictures of the pages: writes docs/images/ from a run of the demo, a dry run and benchmarks/balance.md.

    python benchmarks/pictures.py [--demo outputs/demo/wan2.1-normal] [--only dry_run]

The demo runs first if its folder has no finished run (about four minutes). Pictures are scaled down and stored with a
palette, so that each stays below 150 kB.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
DEMO = ROOT / "outputs/demo/wan2.1-normal"
LARGEST = 150_000  # bytes of a picture
COLOURS = (256, 128, 64, 32)  # of the palette, tried in this order until the file is small enough
BALANCE = (
    "256/1024/512, 30 % images",
    "Wan2.1 14B",
    "4",
)  # rows of benchmarks/balance.md: data, model, slots per rank


def save_small(source: Path | BinaryIO, path: Path, width: int = 1100) -> None:
    """Write a PNG scaled down to at most `width` pixels, with as many colours as LARGEST allows.

    Raises:
        ValueError: the picture is larger than LARGEST with the smallest palette too.
    """
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    for colours in COLOURS:
        buffer = io.BytesIO()
        picture.quantize(colours).save(buffer, format="png", optimize=True)
        if len(buffer.getvalue()) <= LARGEST:
            path.write_bytes(buffer.getvalue())
            return
    raise ValueError(f"{path.name} has {len(buffer.getvalue()):,} bytes at {COLOURS[-1]} colours")


def from_demo(demo: Path) -> None:
    """Write demo.png, losses.png and contact_sheet.png from the demo's run, which is made first if it is not there."""
    curve, sheet = demo / "run/losses.png", demo / "run/first_batch/contact_sheet.png"
    if not ((demo / "comparison.png").exists() and curve.exists() and sheet.exists()):
        family, mode = demo.name.rsplit("-", 1)
        command = [sys.executable, "scripts/demo.py", "--family", family, "--mode", mode, "--output", str(demo.parent)]
        subprocess.run(command, cwd=ROOT, check=True)
    save_small(demo / "comparison.png", IMAGES / "demo.png")
    save_small(curve, IMAGES / "losses.png")
    save_small(sheet, IMAGES / "contact_sheet.png")


def from_dry_run() -> None:
    """Write plan_report.png: what --dry_run draws of the published Wan2.1 1.3B command on 8 GPUs."""
    from dry_run import Case, command, measure, write_metadata

    case = Case("Wan2.1-T2V-1.3B", "ddp", 512)
    with tempfile.TemporaryDirectory(prefix="videox-pictures-") as name:
        folder = Path(name)
        words = command(case, folder / "none", write_metadata(folder / "metadata.jsonl"), folder / "out")
        measure([*words, "--dry_run_model=wan2.1-t2v-1.3b"], folder / "out")
        save_small(folder / "out/plan_report.png", IMAGES / "plan_report.png", width=1400)


def balance_rows() -> list[tuple[str, float, float]]:
    """Return (ranks and kind of launch, balance without a plan, balance of the default plan) from balance.md."""
    rows = []
    for line in (ROOT / "benchmarks/balance.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and (cells[0], cells[1], cells[3]) == BALANCE:
            launch = {"DDP": "DDP, ZeRO-2", "sharded": "ZeRO-3, FSDP"}[cells[4]]
            rows.append((f"{cells[2]} GPUs\n{launch}", float(cells[5]), float(cells[7].split(" / ")[0])))
    return rows


def from_balance() -> None:
    """Write balance.png: the GPUs' busy share with and without the plan."""
    from matplotlib.figure import Figure

    rows = balance_rows()
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    for offset, column, colour, label in ((-0.2, 1, "#9a9a9a", "no plan"), (0.2, 2, "#3b6ea8", "default plan")):
        bars = axes.bar(places + offset, [row[column] for row in rows], 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(places, [row[0] for row in rows], fontsize=8)
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("balance (1 = no GPU waits)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, 1.12))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    buffer.seek(0)
    save_small(buffer, IMAGES / "balance.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", type=Path, default=DEMO, help="folder of a demo run, <family>-<mode> (default: wan2.1)"
    )
    writers = {"balance": from_balance, "dry_run": from_dry_run, "demo": lambda: from_demo(args.demo.resolve())}
    parser.add_argument("--only", choices=tuple(writers), help="write the pictures of one source")
    args = parser.parse_args()
    for name, write in writers.items():
        if args.only in (None, name):
            write()
    for path in sorted(IMAGES.glob("*.png")):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
