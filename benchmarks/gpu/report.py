"""The report of gpu.py in Markdown: predictions beside measurements, by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu.models import ONE_GPU, of_tensors, predicted_memory
from gpu.results import Row
from gpu.scales import LARGEST, Scale
from videox.estimate.memory import CONTEXT, FRAGMENTATION


@dataclass(frozen=True)
class Section:
    """Table of a part: its title, columns of words, of predictions, and of measurements, and a note below it."""

    title: str
    words: tuple[str, ...]
    predicted: tuple[str, ...]
    measured: tuple[str, ...]
    note: str = ""


SECTIONS = {
    "smoke": Section(
        "End to end by train.py", ("family", "flags"), (),
        ("result", "difference", "step s", "encode s", "forward s", "backward s", "optimizer s", "MFU %", "peak GiB",
         "predicted GiB", "GiB error %", "process s"),
        "Few blocks of the published width, random weights, generated clips, three steps by the train script. Rows with --deterministic\n"
        "must have bit-identical losses; the others within 2 % (other rounding) or 20 % (other latents). HunyuanVideo trains a LoRA, and\n"
        "one kind of its blocks in the first row. Steps, their parts and memory are those of metrics.jsonl; predicted GiB is the dry\n"
        "run's estimate (goal: within 10 %).",
    ),
    "step": Section(
        "A whole step, extrapolated", ("model", "clip", "tokens"), ("predicted s", "predicted MFU %"),
        ("step s", "MFU %", "s error %"),
        "Batch 1, every block recomputed, fused AdamW on float32 weights; without encoders. Time is linear in the number of blocks: it is\n"
        "measured with two depths (HunyuanVideo: three). MFU counts the model's own FLOPs. The largest models do not fit on one GPU: the\n"
        "time is that of their computation. Predicted from rates of an H100 (or H200) that are assumed: forward and backward pass of\n"
        "the blocks.",
    ),
    "memory": Section(
        "Full fine-tuning: peak memory of a step", ("model", "clip", "layers"), ("predicted GiB",),
        ("peak GiB", "GiB error %", "step s"),
        "Float32 weights, gradients and moments, bf16 autocast, every block recomputed, fused AdamW, three steps. Predicted\n"
        "by `videox/estimate/memory.py`, without CUDA context and fragmentation, which the allocator's peak does not include.\n"
        "Goal: an error within 10 %.",
    ),
    "flags": Section(
        "Flags of speed and memory, two blocks", ("model", "clip", "flags"), ("predicted s", "predicted GiB"),
        ("step s", "s error %", "peak GiB", "GiB error %", "on the host GiB"),
        "Forward and backward pass of two blocks (HunyuanVideo: one of each kind), and what they add to the memory of the weights. Of two\n"
        "blocks `--offload_activations` moves one input alone, whose memory shows with more of them. What was calculated for whole\n"
        "models is in [gpu_flags.md](gpu_flags.md).",
    ),
    "checks": Section(
        "Checks", ("check",), ("expected",), ("result", "figure"),
        "Expected values were computed or are those of other projects; none was measured here.",
    ),
    "blocks": Section(
        "One block, forward and backward", ("block", "clip", "tokens", "mode", "attention"), ("TFLOP", "kept GiB"),
        ("forward ms", "forward + backward ms", "TFLOP/s", "peak GiB", "first call s"),
        "Float32 weights under autocast to bf16. TFLOP: three times the forward pass, without recomputation. Kept GiB:\n"
        "predicted for the time between the two passes. Peak GiB: everything, with float32 weights and gradients.",
    ),
    "attention": Section(
        "Self-attention by backend", ("model", "heads", "tokens", "mask", "backend"), ("forward TFLOP",),
        ("forward ms", "TFLOP/s", "backward ms", "backward TFLOP/s"),
        "bf16, with the strides of the models' tensors; backward TFLOP/s counts twice the operations of the forward pass.",
    ),
    "vae": Section(
        "Encoding one clip", ("VAE", "clip", "precision"), ("TFLOP", "predicted GiB"),
        ("ms", "TFLOP/s", "peak GiB", "GiB error %"),
        "TFLOP and GiB are predicted on tensors without data. train.py encodes in float32, whose convolutions use TF32 on a GPU.",
    ),
    "transfers": Section(
        "Host to device", ("transfer",), ("GB",), ("s", "GB/s", "once s"),
        "The text encoder is UMT5-XXL in bf16. Memory is pinned once per run (once s), each use is a copy.",
    ),
    "ceilings": Section(
        "Upper bounds: matrix products and copies", ("operation",), ("TFLOP",), ("ms", "TFLOP/s", "TB/s"),
    ),
}  # fmt: skip
CARDS = (80, 141)  # GB


def figure(value: float | str) -> str:
    """Return a number with three significant digits, or text as it is."""
    if isinstance(value, str):
        return value.replace("|", "/")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def section_table(name: str, rows: Sequence[Row], absent: str = "") -> list[str]:
    """Return the table of a part: predicted and measured values, or the reason why none was measured.

    absent: text in place of all measured values ("" = use them).
    """
    section, lines = SECTIONS[name], []
    for row in rows:
        cells = [figure(row.predicted[key]) if key in row.predicted else "" for key in section.predicted]
        if absent or row.reason:
            reason = absent or (f"fail: {row.reason}" if row.failed else f"none: {row.reason}")
            cells += [reason.replace("|", "/"), *[""] * (len(section.measured) - 1)]
        else:
            cells += [figure(row.measured[key]) if key in row.measured else "" for key in section.measured]
        lines.append([*row.words, *cells])
    return table([*section.words, *section.predicted, *section.measured], lines)


# ------------------------------------------------------------------------------------------------ the whole model


def whole_model(scale: Scale, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the memory of full fine-tuning of the largest model with all its layers, by clip size.

    "extrapolated GiB" is on the line through the two truncated models; the verdicts use it, or the predicted memory if
    there is none. "zero3 GPUs" is the smallest power of two of 80 GB GPUs on which ZeRO-3 is predicted to fit, with
    every block recomputed.
    """
    config = scale.wan[LARGEST]
    trained = [row for row in rows if row.section == "memory" and row.words[0] == LARGEST]
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
        line |= {f"fits {card} GB": peak <= card * 1e9 for card in CARDS}
        for gpus in (2**power for power in range(1, 10)):
            setup = replace(ONE_GPU, backend="zero3", processes=gpus, per_host=min(gpus, 8))
            if predicted_memory(config, layers, bucket, setup).total() <= CARDS[0] * 1e9:
                line["zero3 GPUs"] = gpus
                break
        found.append(line)
    return found


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


# ----------------------------------------------------------------------------------------------------------- page


def page(
    known: Mapping[str, Any],
    rows: Sequence[Row],
    predicted: Sequence[Row] | None,
    scale: Scale,
    dates: Mapping[str, str],
) -> str:
    """Return the report: the published widths, measured or only predicted; after it the run at small size, if any.

    Args:
        known: facts about the machine.
        rows: measured.
        predicted: rows of the published widths where `rows` are of the small size; None: `rows` are of them.
        scale: with the published widths.
        dates: when each part was measured.
    """
    small = predicted is not None
    shown, absent = (rows, "") if predicted is None else (predicted, "not measured")
    device = (
        'No GPU was available: measured columns say "not measured", predicted columns are filled'
        if small
        else f"{known['device']}, {known.get('memory GiB', 0):.0f} GiB, CUDA {known.get('cuda')}, cuDNN {known.get('cudnn')}"
    )
    text = [
        "# Measurements of one GPU",
        "",
        "Written by `make gpu` (`python benchmarks/gpu.py`), which takes at most 8 minutes on one GPU.",
        f"{device}.",
    ]
    for name, section in SECTIONS.items():
        chosen = [row for row in shown if row.section == name]
        if not chosen:
            continue
        date = f" ({dates[name]})" if dates.get(name) and not small else ""
        text += ["", f"## {section.title}{date}", "", *section_table(name, chosen, absent)]
        if name == "memory":
            text += ["", *whole_table(whole_model(scale, chosen))]
            text += ["", "80 GB GPUs: the smallest power of two on which ZeRO-3 is predicted to fit."]
        text += ["", section.note] if section.note else []
    if small:
        text += small_page(rows)
    versions = f"torch {known['torch'].split('+')[0]}, diffusers {known['diffusers']}, Python {known['python']}"
    text += ["", f"{known['cores']}-core {known['processor']}; {versions}.", ""]
    return "\n".join(text).replace("\n\n\n", "\n\n")


def small_page(rows: Sequence[Row]) -> list[str]:
    """Return the lines about a run at small size."""
    text = [
        "", "# The same command at small size, on the CPU", "",
        "It shows that every measurement runs, or the reason why not; the figures say nothing about a GPU. The models have the",
        "classes of the named ones, with a few channels and a few layers.", "",
    ]  # fmt: skip
    for name, section in SECTIONS.items():
        chosen = [row for row in rows if row.section == name]
        text += [f"## {section.title}, small", "", *section_table(name, chosen), ""] if chosen else []
    return text
