"""Figures with their intervals below each other on one axis: who won by each measure, how strong each model is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ray_jobs.reporting.charts import LETTER_WIDTH, Scale, Tick
from ray_jobs.reporting.numbers_in_words import percent

AXIS_WIDTH, LEAST_LABEL, LEAST_FIGURE = 286, 200, 154
"""Widths of the axis and, at least, of the labels to the left of it and of the figures to the right."""
ROW_HEIGHT, AXIS_HEIGHT, TOP = 22, 44, 14


class Interval(NamedTuple):
    """One figure with its 95% interval; `text` is how it is written, `kind` how it is coloured."""

    label: str
    value: float
    low: float
    high: float
    text: str
    kind: str = ""


class Row(NamedTuple):
    """An interval's place in SVG units."""

    label: str
    text: str
    kind: str
    y: float
    x: float
    low: float
    high: float


@dataclass(frozen=True)
class IntervalChart:
    """What the template needs to draw it; `reference` is the x of the value that means "no difference"."""

    title: str
    summary: str
    rows: list[Row]
    ticks: list[Tick]
    reference: float
    left_label: str
    right_label: str
    bottom: float
    height: float
    width: float
    axis: tuple[float, float]
    top: float = TOP - 8


def interval_chart(
    title: str,
    intervals: Sequence[Interval],
    *,
    reference: float,
    left_label: str,
    right_label: str,
    limits: tuple[float, float] | None = None,
    shares: bool = False,
) -> IntervalChart | None:
    """Return the chart, or None without intervals.

    Args:
        reference: the value that means "no difference"; always on the axis.
        left_label: what lower values mean.
        right_label: what higher values mean.
        limits: of the axis; else those of the intervals.
        shares: whether the axis is written in percent.
    """
    if not intervals:
        return None
    low, high = limits or _limits(intervals, reference)
    start = max(LEAST_LABEL, *(_width(entry.label) for entry in intervals))
    end = start + AXIS_WIDTH
    width = end + max(LEAST_FIGURE, *(_width(entry.text) for entry in intervals))
    scale = Scale(low, high, start, end)
    rows = [
        Row(entry.label, entry.text, entry.kind, TOP + ROW_HEIGHT * (i + 0.5), *map(scale, (entry.value, entry.low, entry.high)))
        for i, entry in enumerate(intervals)
    ]
    bottom = TOP + ROW_HEIGHT * len(rows)
    summary = "; ".join(f"{entry.label}: {entry.text}" for entry in intervals) + "."
    ticks = [Tick(at, percent(float(label)) if shares else label.replace("-", "\u2212")) for at, label in scale.ticks(4)]
    at, height = scale(reference), bottom + AXIS_HEIGHT
    return IntervalChart(title, summary, rows, ticks, at, left_label, right_label, bottom, height, width, (start, end))


def _width(text: str) -> float:
    return round(LETTER_WIDTH * len(text) + 26, 1)


def _limits(intervals: Sequence[Interval], reference: float) -> tuple[float, float]:
    low, high = min(reference, *(entry.low for entry in intervals)), max(reference, *(entry.high for entry in intervals))
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room
