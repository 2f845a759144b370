"""Geometry of the report's plots: numbers to ticks, paths and circles. The template draws them as themed SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Points = list[tuple[float, float]]
WIDTH, HEIGHT = 480, 262
LEFT, RIGHT, TOP, BOTTOM = 44, 464, 12, 216
MOST_POINTS = 400
LABEL_HEIGHT, LETTER_WIDTH = 15.0, 6.6
LARGEST_RADIUS = 17.0


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
    """One line of a chart. Styles 2n and 2n + 1 share a colour, the second is dashed: colour is never the only difference."""

    name: str
    path: str
    dots: Points
    style: int


class Point(NamedTuple):
    """One thing in a scatter plot; the circle's area shows its size, its colour the kind."""

    name: str
    x: float
    y: float
    size: float
    kind: str


class Circle(NamedTuple):
    """A point's circle, in SVG units."""

    name: str
    kind: str
    x: float
    y: float
    radius: float


class Bubble(NamedTuple):
    """A circle with the place of its label."""

    circle: Circle
    label_x: float
    label_y: float
    anchor: str


class Box(NamedTuple):
    """A rectangle in SVG units."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


FRAME = Box(LEFT, TOP, RIGHT, BOTTOM)


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
    frame: Box = FRAME
    width: int = WIDTH
    height: int = HEIGHT


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
    finite = {name: thinned([p for p in points if math.isfinite(p[1])]) for name, points in curves.items()}
    kept = [(style, name, points) for style, (name, points) in enumerate(finite.items()) if points]
    if not kept:
        return None
    x = _scale([p[0] for _, _, points in kept for p in points], LEFT, RIGHT, margin=0.0)
    y = _scale([p[1] for _, _, points in kept for p in points], BOTTOM, TOP, margin=0.06)
    drawn = [_curve(name, [(x(a), y(b)) for a, b in points], style) for style, name, points in kept]
    summary = "; ".join(_in_words(name, points, x_label) for _, name, points in kept) + "."
    return Chart(title, summary, x_label, y_label, x.ticks(6), y.ticks(5), curves=drawn)


def bubble_chart(title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> Chart | None:
    """Return a scatter plot, or None without points."""
    if not points:
        return None
    x = _scale([point.x for point in points], LEFT, RIGHT, margin=0.16)
    y = _scale([point.y for point in points], BOTTOM, TOP, margin=0.2)
    largest = max(point.size for point in points) or 1.0
    circles = [Circle(p.name, p.kind, x(p.x), y(p.y), round(LARGEST_RADIUS * math.sqrt(p.size / largest), 1)) for p in points]
    bubbles = place_labels(circles)
    summary = "; ".join(f"{p.name}: {p.x:,.4g} {x_label}, {p.y:,.4g} {y_label}" for p in points) + "."
    return Chart(title, summary, x_label, y_label, x.ticks(6), y.ticks(5), bubbles=bubbles)


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most `most` points: the means of equal runs of neighbours; the last point stays as it is."""
    if len(points) <= most:
        return points
    run = math.ceil(len(points) / (most - 1))
    groups = [points[i : i + run] for i in range(0, len(points) - 1, run)]
    return [(_mean([p[0] for p in g]), _mean([p[1] for p in g])) for g in groups] + [points[-1]]


def place_labels(circles: Sequence[Circle]) -> list[Bubble]:
    """Return the circles, each with its label where it covers least of the circles and of earlier labels."""
    taken = [Box(c.x - c.radius, c.y - c.radius, c.x + c.radius, c.y + c.radius) for c in circles]
    bubbles = []
    for circle in circles:
        best = min(_label_places(circle), key=lambda place: _cost(place[0], taken))
        taken.append(best[0])
        bubbles.append(Bubble(circle, round(best[1], 1), round(best[2], 1), best[3]))
    return bubbles


def _label_places(circle: Circle) -> list[tuple[Box, float, float, str]]:
    """Return boxes right, left, above and below of a circle, with the text's x, baseline and anchor."""
    _, _, x, y, radius = circle
    width, side, half = LETTER_WIDTH * len(circle.name), radius + 5, LABEL_HEIGHT / 2
    above, below = y - radius - half - 2, y + radius + half + 2
    return [
        (Box(x + side, y - half, x + side + width, y + half), x + side, y + 4, "start"),
        (Box(x - side - width, y - half, x - side, y + half), x - side, y + 4, "end"),
        (Box(x - width / 2, above - half, x + width / 2, above + half), x, above + 4, "middle"),
        (Box(x - width / 2, below - half, x + width / 2, below + half), x, below + 4, "middle"),
    ]


def _cost(box: Box, taken: Sequence[Box]) -> float:
    outside = max(LEFT - box.left, 0.0) + max(box.right - RIGHT - 20, 0.0) + max(box.bottom - BOTTOM, 0.0) + max(TOP - box.top, 0.0)
    return sum(box.overlap(other) for other in taken) + LABEL_HEIGHT * outside


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _scale(values: Sequence[float], start: float, end: float, *, margin: float) -> Scale:
    low, high = min(values), max(values)
    room = (high - low) * margin or (abs(high) * 0.05 or 1.0) * (low == high)
    return Scale(low - room, high + room, start, end)


def _curve(name: str, points: Points, style: int) -> Curve:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    return Curve(name, path, points if len(points) <= 3 else [], style)


def _in_words(name: str, points: Points, x_label: str) -> str:
    (x0, y0), (x1, y1) = points[0], points[-1]
    if len(points) == 1:
        return f"{name}: {y0:.3g} at {x_label} {x0:g}"
    return f"{name}: from {y0:.3g} at {x_label} {x0:g} to {y1:.3g} at {x_label} {x1:g}"
