"""plan_report.png: whether a run fits a card, what it takes, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from videox.data.plan.balance import PlanBalance
from videox.errors import plural
from videox.estimate.plan_picture import PlanPicture
from videox.files import atomic_write
from videox.shapes import token_count

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#9a9a9a"
MAX_BUCKETS = 16  # buckets with a bar of their own
BINS = 12  # bins of token counts


def plot_plan(path: Path, picture: PlanPicture) -> None:
    """Draw plan_report.png; the file is replaced atomically.

    Args:
        path: of the image file.
        picture: what is drawn.
    """
    several = len(picture.buckets) > 1
    panels: list[tuple[float, Callable[[Axes], None]]] = []  # relative width and function that draws it
    if several:
        panels.append((3, lambda axes: _plot_buckets(axes, picture)))
        panels.append((2.4, lambda axes: _plot_tokens(axes, picture)))
    if picture.balanced:
        panels.append((2.4, lambda axes: _plot_balance(axes, picture.balanced)))
    place = 0.42 if panels else 0.2  # of the second column, as a share of the panel's width
    panels.append((2.4, lambda axes: _write_facts(axes, picture.facts, place)))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        low = not (several or picture.balanced)  # only the memory and the facts
        width = 10 + 4 * several + 4 * bool(picture.balanced)
        figure = Figure(figsize=(width, 4.5 if low else 7), layout="constrained")
        verdict = "fits in" if picture.total <= picture.limit else "DOES NOT FIT in"
        figure.suptitle(
            f"{picture.title}\n{picture.total:.1f} GiB per GPU: {verdict} {picture.limit:g} GiB ({picture.card})",
            fontsize=13,
        )
        rows = figure.add_gridspec(2, 1, height_ratios=(1, 2 if low else 4))
        _plot_memory(figure.add_subplot(rows[0]), picture)
        grid = rows[1].subgridspec(1, len(panels), width_ratios=[width for width, _ in panels])
        for column, (_, draw) in enumerate(panels):
            draw(figure.add_subplot(grid[column]))
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _write_facts(axes: Axes, facts: Mapping[str, str], place: float) -> None:
    """Write what the run takes, one fact per line; place: of the second column, as a share of the width."""
    axes.set_axis_off()
    axes.set_title("What the run takes")
    for line, (name, text) in enumerate(facts.items()):
        height = 0.95 - line * 0.9 / len(facts)
        axes.text(0.0, height, name, fontweight="bold", va="top", transform=axes.transAxes)
        axes.text(place, height, text, va="top", transform=axes.transAxes)


def _plot_memory(axes: Axes, picture: PlanPicture) -> None:
    """Draw one bar of memory by item, at the peak, and the card's limit as a line."""
    start = 0.0
    for number, (name, size) in enumerate(picture.memory.items()):
        axes.barh(0, size, left=start, color=mpl.colormaps["tab20"](number), label=f"{name} {size:.1f}")
        start += size
    axes.axvline(picture.limit, color="black", linestyle="--")
    label = f"{picture.card}: {picture.limit:g} GiB"
    axes.text(picture.limit, 1.02, label, transform=axes.get_xaxis_transform(), fontsize=9)  # above the bar
    axes.set_yticks([])
    axes.set_xlim(0, 1.15 * max(picture.limit, start))
    axes.set_xlabel("GiB per GPU at the peak")
    axes.legend(frameon=False, ncols=8, loc="upper center", bbox_to_anchor=(0.5, -0.6), fontsize=8)


def _plot_buckets(axes: Axes, picture: PlanPicture) -> None:
    """Draw the share of time and of samples of each bucket; the most expensive buckets have their own bars."""
    buckets, counts, flops = picture.buckets, picture.counts, picture.flops
    order = np.argsort(-flops, kind="stable")
    listed, others = order[:MAX_BUCKETS], order[MAX_BUCKETS:]
    names = [
        f"{buckets[i].frames} × {buckets[i].height} × {buckets[i].width}  ({token_count(buckets[i], picture.ratios):,})"
        for i in listed
    ]
    samples, time = counts[listed] / counts.sum(), flops[listed] / flops.sum()
    positions = np.arange(len(names))
    axes.barh(positions - 0.2, 100 * time, 0.4, color=BLUE, label="share of time")
    axes.barh(positions + 0.2, 100 * samples, 0.4, color=GREY, label="share of samples")
    axes.set_yticks(positions, names)
    axes.invert_yaxis()
    axes.set_xlabel("percent")
    title = "Buckets: frames × height × width (tokens per sample)"
    if len(others):
        shares = (
            f"{flops[others].sum() / flops.sum():.0%} of time, {counts[others].sum() / counts.sum():.0%} of samples"
        )
        title += f"\n{len(others)} other {plural(len(others), 'bucket')}: {shares}"
    axes.set_title(title)
    axes.legend(frameon=False, loc="lower right")


def _plot_tokens(axes: Axes, picture: PlanPicture) -> None:
    """Draw time and samples by token count, which is easier to read than names where there are hundreds of buckets."""
    counts, flops = picture.counts, picture.flops
    tokens = np.array([token_count(bucket, picture.ratios) for bucket in picture.buckets])
    edges = np.geomspace(0.999 * tokens.min(), 1.001 * tokens.max(), BINS + 1)
    for weights, colour, label, shift in (
        (flops, BLUE, "share of time", -0.2),
        (counts, GREY, "share of samples", 0.2),
    ):
        share = np.histogram(tokens, edges, weights=weights)[0] / weights.sum()
        axes.bar(np.arange(BINS) + shift, 100 * share, 0.4, color=colour, label=label)
    ticks = np.arange(0, BINS + 1, 2)
    axes.set_xticks(ticks - 0.5, [f"{edges[tick]:,.0f}" for tick in ticks], rotation=45, ha="right")
    axes.set_xlabel("tokens per sample")
    axes.set_ylabel("percent")
    axes.set_title("Samples by number of tokens")
    axes.legend(frameon=False, loc="upper left")


def _plot_balance(axes: Axes, balanced: Mapping[int, PlanBalance]) -> None:
    """Draw balance by number of processes; without a plan there is no bar where the data does not fill one step."""
    positions = np.arange(len(balanced))
    series = (
        ([metrics.balance for metrics in balanced.values()], "planned", BLUE, -0.2),
        ([metrics.unplanned for metrics in balanced.values()], "without a plan", ORANGE, 0.2),
    )
    for values, label, colour, shift in series:
        bars = [
            (position + shift, value) for position, value in zip(positions, values, strict=True) if value is not None
        ]
        for position, value in bars:
            axes.annotate(f"{value:.2f}", (position, value), ha="center", va="bottom", fontsize=8)
        axes.bar([position for position, _ in bars], [value for _, value in bars], 0.4, color=colour, label=label)
    axes.set_xticks(
        positions, [f"{world}\nmix {metrics.step_variance_ratio:.2f}" for world, metrics in balanced.items()]
    )
    axes.set_xlabel("processes\n(mix: variance of steps relative\nto random ones, 1 = random)")
    axes.set_ylabel("balance (1 = no rank waits)")
    axes.set_ylim(0, 1.18)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_title("Balance: share of GPU time\nnot spent waiting for other ranks")
    axes.legend(frameon=False, loc="upper center", ncols=2)
