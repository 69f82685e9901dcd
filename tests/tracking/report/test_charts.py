"""Tests of videox.tracking.report.charts: thinned curves keep their extremes, axes have round ticks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import Parsed

from videox.tracking.report.charts import BINS, Curve, chart, stacked, thin, ticks

VALUES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1, max_size=300)


@given(VALUES, st.integers(1, 50))
def test_a_thinned_curve_keeps_its_extremes_and_its_mean(values, bins):
    steps, column = np.arange(1.0, len(values) + 1), np.array(values)
    points, finite = thin(steps, column, bins), column[np.isfinite(column)]
    assert len(points.steps) <= max(bins, 0) or len(finite) <= bins
    assert np.all(np.diff(points.steps) > 0)
    if len(finite):
        assert (points.low.min(), points.high.max()) == (finite.min(), finite.max())
        assert np.all(points.low <= points.mean + 1e-6) and np.all(points.mean <= points.high + 1e-6)
        assert steps[0] <= points.steps[0] and points.steps[-1] <= steps[-1]


@given(st.floats(-1e8, 1e8), st.floats(1e-6, 1e8))
def test_ticks_are_round_few_and_inside(low, span):
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 12
    assert all(
        low - span * 1e-6 - abs(low) * 1e-9 <= tick <= low + span * (1 + 1e-6) + abs(low) * 1e-9 for tick in found
    )


def test_a_chart_has_its_curves_its_labels_and_bounded_points():
    steps = np.arange(1.0, 20_001)
    noisy = np.sin(steps / 500) + np.random.default_rng(0).normal(size=len(steps))
    page = chart("Loss <b>", [Curve("raw", steps, noisy, "spread"), Curve("mean", steps, noisy)], marks=[9000])
    assert page is not None and len(page) < 60_000
    elements = Parsed(page).elements
    assert [name for name, _ in elements].count("polygon") == 1 and "Loss <b>" in "".join(Parsed(page).text)
    (curves,) = [json.loads(a["data-curves"]) for _, a in elements if "data-curves" in a]
    assert [curve["label"] for curve in curves] == ["mean"] and len(curves[0]["x"]) == BINS
    assert [a["class"] for name, a in elements if name == "line" and a["class"] == "mark"] == ["mark"]


def test_a_few_steps_are_drawn_one_by_one():
    steps = np.array([1.0, 2.0, 3.0])
    page = chart(
        "x", [Curve("raw", steps, steps, "spread"), Curve("mean", steps, steps), Curve("dots", steps, steps, "points")]
    )
    assert page.count("<polyline") == 3 and "<polygon" not in page and page.count("h0") == 3


@pytest.mark.parametrize("step", [0, 1, 7, 61, 10_000])
def test_the_axis_of_steps_has_whole_numbers(step):
    page = chart("x", [Curve("y", np.array([float(step)]), np.ones(1), "points")])
    assert f">{step:,}<" in page
    below = page[page.index('class="below"') :]
    assert "." not in "".join(Parsed(below[: below.index("</div>")]).text)


@pytest.mark.parametrize("count", [BINS, BINS + 1, 700, 3000])
def test_a_spread_is_an_area_without_gaps(count):
    """Two values a point, and one at the next, would be drawn as separate spikes."""
    steps = np.arange(1.0, count + 1)
    page = chart("x", [Curve("raw", steps, steps % 2, "spread")])
    (points,) = [a["points"] for name, a in Parsed(page).elements if name in ("polygon", "polyline")]
    heights = [float(point.split(",")[1]) for point in points.split()]
    if count > BINS:
        high, low = heights[: len(heights) // 2], heights[len(heights) // 2 :][::-1]
        assert len(high) <= BINS and all(b - a > 100 for a, b in zip(high, low, strict=True))
    else:
        assert len(heights) == count


@pytest.mark.parametrize("values", [[], [float("nan")] * 4, [0.0] * 4, [1e-30] * 4, [-5.0, 5.0, 1e12, float("inf")]])
def test_unusual_values_are_drawn_or_left_out(values):
    steps = np.arange(1.0, len(values) + 1)
    for log in (False, True):
        page = chart("x", [Curve("y", steps, np.array(values))], log=log)
        assert (page is None) == (not np.isfinite(values).any() if len(values) else True)
        assert page is None or ("nan" not in page.lower() and "inf" not in page.lower())
    finite = np.array([value for value in values if np.isfinite(value)])
    assert (stacked("x", steps, {"a": np.array(values)}) is None) == (not finite.sum() > 0)
