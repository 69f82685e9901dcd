"""Serves whoever plans a run and would rather look: where the time goes, and how evenly GPUs are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from videox.data.plan.balance import PlanBalance
from videox.files import atomic_write
from videox.shapes import Bucket, token_count

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#9a9a9a"
MOST = 16  # buckets that are named
BINS = 12  # of token counts


def plot_plan(
    path: Path,
    buckets: Sequence[Bucket],
    counts: np.ndarray,
    spent: np.ndarray,
    balanced: Mapping[int, PlanBalance],
) -> None:
    """Draws plan_report.png, replaced as a whole.

    Args:
        path: of the picture.
        buckets: of an epoch; counts: samples of each; spent: operations of all its samples.
        balanced: by the number of processes.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 5), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2.4, 2))
        _plot_buckets(left, buckets, counts, spent)
        _plot_tokens(middle, np.array([token_count(bucket) for bucket in buckets]), counts, spent)
        _plot_balance(right, balanced)
        with atomic_write(path) as aside:
            figure.savefig(aside, format="png", dpi=120)


def _plot_buckets(axes: Axes, buckets: Sequence[Bucket], counts: np.ndarray, spent: np.ndarray) -> None:
    order = np.argsort(-spent, kind="stable")
    shown, rest = order[:MOST], order[MOST:]
    names = [
        f"{buckets[i].frames} × {buckets[i].height} × {buckets[i].width}  ({token_count(buckets[i]):,})" for i in shown
    ]
    samples, time = counts[shown] / counts.sum(), spent[shown] / spent.sum()
    places = np.arange(len(names))
    axes.barh(places - 0.2, 100 * time, 0.4, color=BLUE, label="of the time")
    axes.barh(places + 0.2, 100 * samples, 0.4, color=GREY, label="of the samples")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("percent")
    title = "Buckets: frames × height × width (tokens)"
    if len(rest):
        others = f"{spent[rest].sum() / spent.sum():.0%} of the time, {counts[rest].sum() / counts.sum():.0%} of the samples"
        title += f"\n{len(rest)} more take {others}"
    axes.set_title(title)
    axes.legend(frameon=False, loc="lower right")


def _plot_tokens(axes: Axes, tokens: np.ndarray, counts: np.ndarray, spent: np.ndarray) -> None:
    """Where there are hundreds of buckets their sizes tell more than their names."""
    edges = np.geomspace(0.999 * tokens.min(), 1.001 * tokens.max(), BINS + 1)
    for weights, colour, label, shift in ((spent, BLUE, "of the time", -0.2), (counts, GREY, "of the samples", 0.2)):
        share = np.histogram(tokens, edges, weights=weights)[0] / weights.sum()
        axes.bar(np.arange(BINS) + shift, 100 * share, 0.4, color=colour, label=label)
    shown = np.arange(0, BINS + 1, 2)
    axes.set_xticks(shown - 0.5, [f"{edges[place]:,.0f}" for place in shown], rotation=45, ha="right")
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("percent")
    axes.set_title("Samples by their size")
    axes.legend(frameon=False, loc="upper left")


def _plot_balance(axes: Axes, balanced: Mapping[int, PlanBalance]) -> None:
    """Where the data is too small for one step without a plan there is no bar."""
    places = np.arange(len(balanced))
    series = (
        ([load.balance for load in balanced.values()], "planned", BLUE, -0.2),
        ([load.unplanned for load in balanced.values()], "without a plan", ORANGE, 0.2),
    )
    for values, label, colour, shift in series:
        known = [(place + shift, value) for place, value in zip(places, values, strict=True) if value is not None]
        for place, value in known:
            axes.annotate(f"{value:.2f}", (place, value), ha="center", va="bottom", fontsize=8)
        axes.bar([place for place, _ in known], [value for _, value in known], 0.4, color=colour, label=label)
    axes.set_xticks(places, [f"{world}\nmix {load.step_variance_ratio:.2f}" for world, load in balanced.items()])
    axes.set_xlabel("processes")
    axes.set_ylabel("balance")
    axes.set_ylim(0, 1.18)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_title("GPUs' time in which none waits")
    axes.legend(frameon=False, loc="upper center", ncols=2)
