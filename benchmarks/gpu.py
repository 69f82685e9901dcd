"""Measures one GPU in under ten minutes: kernels, transformer blocks, encoders, transfers and memory.

    python benchmarks/gpu.py [--output gpu.json] [--markdown benchmarks/gpu.md] [--small] [--only attention blocks]

Layers have the published widths and random weights created on the device; nothing is downloaded. Without a GPU
everything runs at small size on the CPU, which only shows that the command works. Measurements run in a separate
process, which is restarted when a measurement exceeds its time budget or ends the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import diffusers
import torch
from gpu_models import ONE_GPU, of_tensors, predicted_memory
from gpu_process import PARTS, Measurer, cases
from gpu_scales import LARGEST, REAL, SMALL, Scale, Values
from machine import processor

from videox.estimate.memory import CONTEXT, FRAGMENTATION
from videox.estimate.mfu import peak_of

MINUTES = 9.5


@dataclass(frozen=True)
class Row:
    """Result of a case. seconds: total duration, with creation of the weights and warm-up."""

    section: str
    words: tuple[str, ...]
    predicted: Values
    measured: Values
    reason: str
    seconds: float


def run(scale: Scale, device: str, sections: Sequence[str], minutes: float) -> Iterator[Row]:
    """Yield a row for each case; cases that remain after `minutes` are not started."""
    end = time.monotonic() + 60 * minutes
    with Measurer(scale, device) as measurer:
        for number, case in enumerate(cases(scale, PARTS)):
            if case.section not in sections:
                continue
            begun = time.monotonic()
            if begun < end:
                values, reason = measurer.measure(number, min(case.budget, end - begun))
            else:
                values, reason = {}, f"not started within the limit of {minutes:g} min"
            predicted = case.predict()
            taken = values.get("forward + backward ms", values.get("ms"))
            if taken and "TFLOP" in predicted:
                values["TFLOP/s"] = predicted["TFLOP"] / taken * 1e3
            yield Row(case.section, case.words, predicted, values, reason, time.monotonic() - begun)


# ------------------------------------------------------------------------------------------------ the whole model


def whole_model(scale: Scale, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the memory of full fine-tuning of the largest model with all its layers, by clip size.

    "extrapolated GiB" is on the line through the two truncated models; the verdicts use it, or the predicted memory if
    there is none. "zero3 GPUs" is the smallest power of two of 80 GB GPUs on which ZeRO-3 is predicted to fit, with
    every block recomputed.
    """
    config = scale.wan[LARGEST]
    trained = [row for row in rows if row.section == "memory"]
    found = []
    for size in dict.fromkeys(row.words[1] for row in trained):
        few = {int(row.words[2]): row.measured["peak GiB"] for row in trained if row.words[1] == size and row.measured}
        layers, bucket = config["num_layers"], scale.sizes[size]
        line: dict[str, Any] = {"size": size, "layers": layers}
        line["predicted GiB"] = of_tensors(predicted_memory(config, layers, bucket, ONE_GPU))
        if len(few) == 2:
            (a, first), (b, second) = sorted(few.items())
            line["extrapolated GiB"] = second + (second - first) / (b - a) * (layers - b)
        peak = line.get("extrapolated GiB", line["predicted GiB"]) * 2**30 * (1 + FRAGMENTATION) + CONTEXT
        line |= {f"fits {card} GB": peak <= card * 1e9 for card in (80, 141)}
        for gpus in (2**power for power in range(1, 10)):
            setup = replace(ONE_GPU, backend="zero3", processes=gpus, per_host=min(gpus, 8))
            if predicted_memory(config, layers, bucket, setup).total() <= 80e9:
                line["zero3 GPUs"] = gpus
                break
        found.append(line)
    return found


def machine(device: str) -> dict[str, Any]:
    """Return the device and the versions that the figures depend on."""
    known: dict[str, Any] = {"device": "none", "cores": os.cpu_count(), "processor": processor()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known |= {"device": properties.name, "memory GiB": properties.total_memory / 2**30}
        known |= {"sheet TFLOP/s": (peak_of(properties.name) or 0.0) / 1e12, "cuda": torch.version.cuda}
        known["cudnn"] = torch.backends.cudnn.version()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    return known | versions


# -------------------------------------------------------------------------------------------------------------- table

SECTIONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "ceilings": ("Upper bounds: matrix products and copies", ("operation",), ("TFLOP",), ("ms", "TFLOP/s", "TB/s")),
    "memory": (
        "Full fine-tuning: peak memory of a step",
        ("model", "clip", "layers"),
        ("predicted GiB",),
        ("peak GiB", "step s"),
    ),
    "blocks": (
        "One block, forward and backward",
        ("block", "clip", "tokens", "mode", "attention"),
        ("TFLOP", "kept GiB"),
        ("forward ms", "forward + backward ms", "TFLOP/s", "peak GiB", "first call s"),
    ),
    "attention": (
        "Self-attention by backend",
        ("model", "heads", "tokens", "mask", "backend"),
        ("forward TFLOP",),
        ("forward ms", "TFLOP/s", "backward ms", "backward TFLOP/s"),
    ),
    "encoders": (
        "Encoding one clip",
        ("VAE", "clip", "precision"),
        ("TFLOP", "predicted GiB"),
        ("ms", "TFLOP/s", "peak GiB"),
    ),
    "transfers": ("Host to device", ("transfer",), ("GB",), ("s", "GB/s", "once s")),
}
NOTES = {
    "memory": "Float32 weights, gradients and moments, bf16 autocast, every block recomputed, fused AdamW, three steps. Predicted\n"
    "by `videox/estimate/memory.py`, without CUDA context and fragmentation, which the allocator's peak does not include.",
    "blocks": "Float32 weights under autocast to bf16. TFLOP: three times the forward pass, without recomputation. Kept GiB:\n"
    "predicted for the time between the two passes. Peak GiB: everything, with float32 weights and gradients.",
    "attention": "bf16, with the strides of the models' tensors; backward TFLOP/s counts twice the operations of the forward pass.",
    "encoders": "TFLOP and GiB are predicted on tensors without data. train.py encodes in float32.",
    "transfers": "The text encoder is UMT5-XXL in bf16. Memory is pinned once per run (once s), each use is a copy.",
}


def figure(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def section_table(name: str, rows: Sequence[Row], absent: str = "") -> list[str]:
    """Return the table of a section: predicted and measured values, or the reason why none was measured.

    absent: text in place of all measured values ("" = use them).
    """
    _, words, predicted, columns = SECTIONS[name]
    lines = []
    for row in rows:
        cells = [figure(row.predicted[key]) if key in row.predicted else "" for key in predicted]
        if absent or row.reason:
            cells += [absent or f"none: {row.reason}".replace("|", "/"), *[""] * (len(columns) - 1)]
        else:
            cells += [figure(row.measured[key]) if key in row.measured else "" for key in columns]
        lines.append([*row.words, *cells])
    return table([*words, *(f"{key}, predicted" if key in columns else key for key in predicted), *columns], lines)


def whole_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the memory of the whole model."""
    words = {True: "yes", False: "no"}
    cells = [
        [
            LARGEST, line["size"], str(line["layers"]), figure(line["predicted GiB"]),
            figure(line["extrapolated GiB"]) if "extrapolated GiB" in line else "not measured",
            words[line["fits 80 GB"]], words[line["fits 141 GB"]], str(line.get("zero3 GPUs", "over 512")),
        ]
        for line in lines
    ]  # fmt: skip
    header = (
        "model",
        "clip",
        "layers",
        "predicted GiB",
        "extrapolated GiB",
        "fits 80 GB",
        "fits 141 GB",
        "80 GB GPUs",
    )
    return table(header, cells)


def page(known: dict[str, Any], small: bool, rows: Sequence[Row]) -> str:
    """Return the report: the published widths, measured or only predicted; after it the run at small size, if any."""
    shown = [Row(c.section, c.words, c.predict(), {}, "", 0.0) for c in cases(REAL, PARTS)] if small else list(rows)
    device = (
        known["device"]
        if not small
        else 'No GPU was available: measured columns say "not measured", predicted columns are filled'
    )
    text = [
        "# Measurements of one GPU",
        "",
        "Written by `python benchmarks/gpu.py --markdown benchmarks/gpu.md`, which takes under ten minutes on one GPU.",
        f"{device}.",
    ]
    for name, (title, *_) in SECTIONS.items():
        chosen = [row for row in shown if row.section == name]
        if not chosen:
            continue
        text += ["", f"## {title}", "", *section_table(name, chosen, "not measured" if small else "")]
        if name == "memory":
            text += ["", *whole_table(whole_model(REAL, chosen))]
            text += ["", "80 GB GPUs: the smallest power of two on which ZeRO-3 is predicted to fit."]
        text += ["", NOTES[name]] if name in NOTES else []
    if small:
        text += ["", "# The same command at small size, on the CPU", ""]
        text += [
            "It shows that every measurement runs, or the reason why not; the figures say nothing about a GPU. The models have the"
        ]
        text += ["classes of the named ones, with a few channels and a few layers.", ""]
        for name, (title, *_) in SECTIONS.items():
            chosen = [row for row in rows if row.section == name]
            text += [f"## {title}, small", "", *section_table(name, chosen), ""] if chosen else []
    versions = f"torch {known['torch'].split('+')[0]}, diffusers {known['diffusers']}, Python {known['python']}"
    text += ["", f"{known['cores']}-core {known['processor']}; {versions}.", ""]
    return "\n".join(text).replace("\n\n\n", "\n\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write (default: print only)")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write (default: print only)")
    parser.add_argument("--small", action="store_true", help="narrow models on the CPU (the default without a GPU)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=tuple(PARTS), help="sections to measure (default: all)"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="minutes after which no further measurement is started"
    )
    args = parser.parse_args(argv)
    small = args.small or not torch.cuda.is_available()
    scale, device = (SMALL, "cpu") if small else (REAL, "cuda")
    known, rows = machine(device), []
    for row in run(scale, device, args.only, args.minutes):
        rows.append(row)
        values = row.reason or ", ".join(f"{key} {figure(value)}" for key, value in row.measured.items())
        print(row.section, *row.words, values, f"[{row.seconds:.1f} s]", sep="  ", flush=True)
    whole = whole_model(scale, rows)
    found = {"machine": known, "small": small, "rows": [asdict(row) for row in rows], "whole_model": whole}
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(page(known, small, rows), encoding="utf-8")
    return 0 if any(row.measured for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
