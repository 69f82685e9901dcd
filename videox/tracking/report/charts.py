"""Charts as SVG: curves over optimizer steps, thinned to a bounded number of points."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from videox.tracking.report.markup import Markup, number, tag

BINS = 500  # most points of a curve: more than there are pixels for on a small screen
WIDTH, HEIGHT = 1000, 300  # of the drawing's own coordinates; the page stretches it
SPREAD = (1.0, 99.0)  # percentiles of single steps that decide the range of the axis; the smoothed curves always fit


@dataclass(frozen=True)
class Curve:
    """One curve: its label, steps and values [n] (NaN where there is none), and how it is drawn.

    Attributes:
        style: "line"; "spread": the area between smallest and largest value, behind the lines; "points": joined dots.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    style: str = "line"


@dataclass(frozen=True)
class Binned:
    """A thinned curve, one entry per bin that has a finite value: mean step, and mean, least and largest value."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin(steps: np.ndarray, values: np.ndarray, bins: int = BINS) -> Binned:
    """Return a curve with at most `bins` points, each for an equal range of steps; values that are not finite are
    left out, and no other: the smallest and largest value of the curve are among `low` and `high`.

    Args:
        steps: float64 [n], increasing.
        values: float64 [n].
        bins: at least 1.
    """
    finite = np.isfinite(values) & np.isfinite(steps)
    steps, values = steps[finite], values[finite]
    if len(values) <= bins:
        return Binned(steps, values, values, values)
    span = max(float(steps[-1] - steps[0]), 1e-9)
    place = np.minimum(((steps - steps[0]) / span * bins).astype(np.int64), bins - 1)
    first = np.flatnonzero(np.diff(place, prepend=-1))
    counts = np.diff(np.append(first, len(place)))
    return Binned(
        np.add.reduceat(steps, first) / counts,
        np.add.reduceat(values, first) / counts,
        np.minimum.reduceat(values, first),
        np.maximum.reduceat(values, first),
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / unit - 1e-9)
    return [unit * i for i in range(first, math.floor(high / unit + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axis:
    """Maps values to coordinates from the top (or left) of the drawing, as shares of its size."""

    low: float
    high: float
    log: bool = False

    def share(self, values: np.ndarray) -> np.ndarray:
        if self.log:
            values = np.log10(np.maximum(values, 1e-300))
        return (values - self.low) / max(self.high - self.low, 1e-300)

    def marks(self, *, whole: bool = False) -> list[tuple[float, str]]:
        """Share and label of each tick; whole: of whole numbers only, such as steps."""
        if not self.log:
            chosen = [t for t in ticks(self.low, self.high) if not whole or abs(t - round(t)) < 1e-6]
            return [(float(self.share(np.array(t))), number(t)) for t in chosen]
        powers = [t for t in ticks(self.low, self.high) if abs(t - round(t)) < 1e-9] or [self.low, self.high]
        return [((t - self.low) / max(self.high - self.low, 1e-300), number(10.0**t)) for t in powers]


def _value_axis(thinned: Sequence[tuple[Curve, Binned]], log: bool) -> _Axis:
    """Return an axis for all lines and points, and nearly all of the single values of a spread."""
    values = []
    for curve, points in thinned:
        if curve.style == "spread" and len(points.low):
            values.append(np.percentile(np.concatenate([points.low, points.high]), SPREAD))
        else:
            values.append(points.mean)
    found = np.concatenate(values) if values else np.zeros(0)
    if log:
        found = np.log10(found[found > 0])
    if not len(found):
        return _Axis(0.0, 1.0, log)
    low, high = float(found.min()), float(found.max())
    # of values that are all but equal, every tick would have the same label
    flat = high - low < 2e-3 * abs(high)
    margin = max((high - low) * 0.06, abs(high) * 0.02 if flat else 0.0, 1e-12)
    bottom = low - margin
    return _Axis(0.0 if low >= 0 > bottom and not log else bottom, high + margin, log)


def chart(
    title: str, curves: Sequence[Curve], *, note: str = "", log: bool = False, marks: Sequence[int] = ()
) -> Markup | None:
    """Return a chart of curves over the optimizer step; None if none of them has a value.

    Args:
        title: above it.
        curves: in the order of their colors.
        note: below it.
        log: logarithmic values, if all of them are above 0.
        marks: steps to mark by a vertical line, such as resumes.
    """
    thinned = [(curve, thin(curve.steps, curve.values, _bins(curve))) for curve in curves]
    thinned = [(curve, points) for curve, points in thinned if len(points.steps)]
    if not thinned:
        return None
    log = log and all(float(points.low.min()) > 0 for _, points in thinned)
    y, x = _value_axis(thinned, log), _step_axis([points.steps for _, points in thinned])
    drawn = [_mark(x, step) for step in marks if x.low < step <= x.high]
    legend: list[tuple[str, str]] = []
    place = 0
    for curve, points in thinned:  # a spread has the color of the line that follows it
        drawn.append(_draw(curve.style, points, x, y, f"c{place % 8}"))
        legend.append((curve.label, f"faint c{place % 8}" if curve.style == "spread" else f"c{place % 8}"))
        place += curve.style != "spread"
    hover = [
        {"label": curve.label, "x": _short(points.steps), "y": _short(points.mean)}
        for curve, points in thinned
        if curve.style != "spread"
    ]
    return _figure(title, drawn, (x, y), legend, hover, note)


def _bins(curve: Curve) -> int:
    """Return the most points of a curve: of a spread so few that each has a range of several steps, if not all."""
    return BINS if curve.style != "spread" or len(curve.steps) <= BINS else min(BINS, len(curve.steps) // 4)


def stacked(title: str, steps: np.ndarray, parts: Mapping[str, np.ndarray], *, note: str = "") -> Markup | None:
    """Return a chart of parts that add up, as areas above one another; None if there is no value.

    Args:
        title: above it.
        steps: float64 [n].
        parts: values of each part, float64 [n], 0 or more; one that is not finite counts as 0.
        note: below it.
    """
    finite = {label: np.where(np.isfinite(values), values, 0.0) for label, values in parts.items()}
    shown = {label: values for label, values in finite.items() if values.sum() > 0}
    if not shown or not len(steps):
        return None
    means = {label: thin(steps, values) for label, values in shown.items()}
    at = next(iter(means.values())).steps
    heights = np.cumsum([points.mean for points in means.values()], axis=0)
    x, y = _step_axis([at]), _Axis(0.0, float(heights[-1].max()) * 1.05 or 1.0)
    floor, drawn = np.zeros(len(at)), []
    for place, height in enumerate(heights):
        drawn.append(_area(at, floor, height, x, y, f"area c{place % 8}"))
        floor = height
    legend = [(label, f"c{place % 8}") for place, label in enumerate(means)]
    hover = [{"label": label, "x": _short(at), "y": _short(points.mean)} for label, points in means.items()]
    return _figure(title, drawn, (x, y), legend, hover, note)


def _step_axis(steps: Sequence[np.ndarray]) -> _Axis:
    low, high = min(float(s[0]) for s in steps), max(float(s[-1]) for s in steps)
    return _Axis(low, high) if high > low else _Axis(low - 0.5, high + 0.5)


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _points(steps: np.ndarray, values: np.ndarray, x: _Axis, y: _Axis) -> list[str]:
    across = x.share(steps) * WIDTH
    down = np.clip(1 - y.share(values), -1, 2) * HEIGHT  # far outside of the drawing is as good as anywhere outside
    return [f"{a:.1f},{b:.1f}" for a, b in zip(across.tolist(), down.tolist(), strict=True)]


def _area(steps: np.ndarray, low: np.ndarray, high: np.ndarray, x: _Axis, y: _Axis, kind: str) -> Markup:
    around = _points(steps, high, x, y) + _points(steps, low, x, y)[::-1]
    return tag("polygon", points=Markup(" ".join(around)), class_=kind)


def _draw(style: str, points: Binned, x: _Axis, y: _Axis, color: str) -> Markup:
    if style == "spread":
        if np.any(points.high > points.low):
            return _area(points.steps, points.low, points.high, x, y, f"spread {color}")
        single = _points(points.steps, points.mean, x, y)  # every step has its own point
        return tag("polyline", points=Markup(" ".join(single)), class_=f"line faint {color}")
    along = _points(points.steps, points.mean, x, y)
    line = tag("polyline", points=Markup(" ".join(along)), class_=f"line {color}")
    if style == "line" and len(along) > 1:
        return line
    dots = "".join(f"M{point.replace(',', ' ')}h0" for point in along)
    return Markup(line + tag("path", d=Markup(dots), class_=f"dots {color}"))


def _mark(x: _Axis, step: int) -> Markup:
    at = f"{float(x.share(np.array(float(step)))) * WIDTH:.1f}"
    return tag("line", x1=at, x2=at, y1=0, y2=HEIGHT, class_="mark")


def _figure(
    title: str,
    drawn: Sequence[Markup],
    axes: tuple[_Axis, _Axis],
    legend: Sequence[tuple[str, str]],
    hover: Sequence[Mapping[str, object]],
    note: str,
) -> Markup:
    """Return the drawing with axis labels as text beside it, so that they keep their size when it is stretched."""
    x, y = axes
    lines = [
        tag("line", x1=0, x2=WIDTH, y1=f"{(1 - share) * HEIGHT:.1f}", y2=f"{(1 - share) * HEIGHT:.1f}", class_="grid")
        for share, _ in y.marks()
    ]
    left = [tag("span", label, style=f"bottom:{100 * share:.1f}%") for share, label in y.marks() if 0 <= share <= 1]
    below = [
        tag("span", label, style=f"left:{100 * share:.1f}%", class_="end" if share > 0.93 else None)
        for share, label in x.marks(whole=True)
        if 0 <= share <= 1
    ]
    last = ", ".join(f"{curve['label']} {curve['y'][-1]:g}" for curve in hover)  # type: ignore[index]
    box = f"0 0 {WIDTH} {HEIGHT}"
    svg = tag(
        "svg", *lines, *drawn, viewBox=box, preserveAspectRatio="none", role="img", aria_label=f"{title}: last {last}"
    )
    names = [tag("span", tag("i"), label, class_=kind) for label, kind in legend]
    content = Markup(html.escape(json.dumps(hover, allow_nan=False)))
    return tag(
        "figure",
        tag("figcaption", tag("b", title), *names),
        tag("div", tag("div", *left, class_="left"), tag("div", svg, class_="plot"), tag("div", *below, class_="below"),
            class_="chart", data_low=f"{x.low:g}", data_high=f"{x.high:g}", data_curves=content),
        tag("p", note, class_="note") if note else None,
    )  # fmt: skip
