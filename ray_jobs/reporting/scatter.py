"""Many points on two axes, a colour for each group: similarity against the length of the answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_jobs.reporting.charts import BOTTOM, FRAME, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Box, Points, Scale, Tick

MOST_POINTS = 600
"""Points of one group: more only paint over each other, and make the page heavy."""


@dataclass(frozen=True)
class Scatter:
    """What the template needs to draw it; `groups` are {kind: places in SVG units} and `notes` {kind: what the key says}."""

    title: str
    summary: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    groups: dict[str, Points]
    notes: Mapping[str, str]
    curves: list[None] = field(default_factory=list)
    bubbles: list[None] = field(default_factory=list)
    frame: Box = FRAME
    width: int = WIDTH
    height: int = HEIGHT


def scatter(title: str, groups: Mapping[str, Points], notes: Mapping[str, str], *, x_label: str, y_label: str) -> Scatter | None:
    """Return the plot, or None without points; of a large group every nth point is drawn.

    Args:
        groups: {kind: points}; the kind is the class that colours it.
        notes: {kind: words for the key, and for those who do not see the plot}.
    """
    drawn = {kind: points[:: -(-len(points) // MOST_POINTS)] for kind, points in groups.items() if points}
    if not drawn:
        return None
    x = _scale([p[0] for points in drawn.values() for p in points], LEFT, RIGHT)
    y = _scale([p[1] for points in drawn.values() for p in points], BOTTOM, TOP)
    placed = {kind: [(x(a), y(b)) for a, b in points] for kind, points in drawn.items()}
    shown, whole = sum(map(len, drawn.values())), sum(map(len, groups.values()))
    said = "; ".join(notes[kind] for kind in drawn) + "."
    summary = said if shown == whole else f"{said} {shown:,} of {whole:,} points are drawn."
    return Scatter(title, summary, x_label, y_label, x.ticks(6), y.ticks(5), placed, notes)


def _scale(values: list[float], start: float, end: float) -> Scale:
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 1.0
    return Scale(low - room, high + room, start, end)
