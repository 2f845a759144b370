"""Geometry of the report's plots: numbers to ticks, paths and circles. The template draws them as themed SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Points = list[tuple[float, float]]
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 620, 14, 256
MOST_POINTS = 400
LABEL_GAP = 16
LARGEST_RADIUS = 22.0


class Tick(NamedTuple):
    """A position on an axis, in SVG units, and what is written there."""

    at: float
    label: str


class Scale(NamedTuple):
    """A linear map from [low, high] to [start, end] in SVG units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the SVG coordinate of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[Tick]:
        """Return about `count` round values within the scale."""
        return [Tick(self(value), label) for value, label in round_values(self.low, self.high, count)]


class Curve(NamedTuple):
    """One line of a chart; `style` picks colour and dash, so that colour is never the only difference."""

    name: str
    path: str
    dots: Points
    style: int


class Bubble(NamedTuple):
    """One circle of a scatter plot with its label beside it."""

    name: str
    x: float
    y: float
    radius: float
    label_x: float
    label_y: float
    anchor: str
    style: int


@dataclass(frozen=True)
class Chart:
    """What the template needs to draw one plot. `summary` says in words what the plot shows."""

    title: str
    summary: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve] = field(default_factory=list)
    bubbles: list[Bubble] = field(default_factory=list)


def round_values(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Return about `count` multiples of 1, 2 or 5 times a power of ten within [low, high], each with its text."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, f"{n * step:,.{decimals}f}") for n in range(first, last + 1)]


def line_chart(title: str, curves: dict[str, Points], *, x_label: str, y_label: str) -> Chart | None:
    """Return a chart of the curves by name, or None where there is no finite point.

    Args:
        curves: points in the order of x; a curve of up to 3 points is drawn with dots.
    """
    kept = {name: thinned([p for p in points if math.isfinite(p[1])]) for name, points in curves.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return None
    x = _scale([p[0] for points in kept.values() for p in points], LEFT, RIGHT, margin=0.0)
    y = _scale([p[1] for points in kept.values() for p in points], BOTTOM, TOP, margin=0.06)
    drawn = [_curve(name, [(x(a), y(b)) for a, b in points], style) for style, (name, points) in enumerate(kept.items())]
    summary = "; ".join(_in_words(name, points, x_label) for name, points in kept.items()) + "."
    return Chart(title, summary, x_label, y_label, x.ticks(6), y.ticks(5), curves=drawn)


def bubble_chart(title: str, points: Sequence[tuple[str, float, float, float]], *, x_label: str, y_label: str) -> Chart | None:
    """Return a scatter plot of (name, x, y, size), the circles' areas as the sizes, or None without points."""
    if not points:
        return None
    x = _scale([p[1] for p in points], LEFT, RIGHT, margin=0.16)
    y = _scale([p[2] for p in points], BOTTOM, TOP, margin=0.18)
    largest = max(p[3] for p in points) or 1.0
    circles = [(name, x(a), y(b), round(LARGEST_RADIUS * math.sqrt(size / largest), 1)) for name, a, b, size in points]
    labels = spread([c[2] for c in circles], LABEL_GAP)
    bubbles = [_bubble(*circle, label_y, style) for style, (circle, label_y) in enumerate(zip(circles, labels, strict=True))]
    summary = "; ".join(f"{name}: {a:,.4g} {x_label}, {b:,.4g} {y_label}" for name, a, b, _ in points) + "."
    return Chart(title, summary, x_label, y_label, x.ticks(6), y.ticks(5), bubbles=bubbles)


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most `most` points: the means of equal runs of neighbours; the last point stays as it is."""
    if len(points) <= most:
        return points
    run = math.ceil(len(points) / (most - 1))
    groups = [points[i : i + run] for i in range(0, len(points) - 1, run)]
    return [(_mean([p[0] for p in g]), _mean([p[1] for p in g])) for g in groups] + [points[-1]]


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Return the positions moved apart so that no two are closer than `gap`, in the same order and about the same place."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed: dict[int, float] = {}
    previous = -math.inf
    for i in order:
        previous = placed[i] = max(positions[i], previous + gap)
    shift = _mean([placed[i] - positions[i] for i in order]) if order else 0.0
    return [round(placed[i] - shift, 1) for i in range(len(positions))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _scale(values: Sequence[float], start: float, end: float, *, margin: float) -> Scale:
    low, high = min(values), max(values)
    room = (high - low) * margin or (abs(high) * 0.05 or 1.0) * (low == high)
    return Scale(low - room, high + room, start, end)


def _curve(name: str, points: Points, style: int) -> Curve:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    return Curve(name, path, points if len(points) <= 3 else [], style)


def _bubble(name: str, x: float, y: float, radius: float, label_y: float, style: int) -> Bubble:
    fits_right = x + radius + 6 + 7.5 * len(name) < RIGHT + 10
    label_x = x + radius + 6 if fits_right else x - radius - 6
    return Bubble(name, x, y, radius, round(label_x, 1), label_y, "start" if fits_right else "end", style)


def _in_words(name: str, points: Points, x_label: str) -> str:
    (x0, y0), (x1, y1) = points[0], points[-1]
    if len(points) == 1:
        return f"{name}: {y0:.3g} at {x_label} {x0:g}"
    return f"{name}: from {y0:.3g} at {x_label} {x0:g} to {y1:.3g} at {x_label} {x1:g}"
