"""How far every judge agrees with every metric and every other judge: a matrix of kappas, darker where they agree more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray_jobs.reporting.charts import LETTER_WIDTH, Tick
from ray_jobs.reporting.numbers_in_words import number

HEAD, CELL_WIDTH, CELL_HEIGHT, LEAST_LABEL = 30, 88, 40, 110
SLOPE = 0.5
"""Sine of the angle at which the columns' names stand where one is wider than its column."""


class Cell(NamedTuple):
    """One kappa with its interval; `strength` in [0, 1] shades it. `x` and `y` are its corner in SVG units."""

    x: float
    y: float
    text: str
    interval: str
    strength: float


@dataclass(frozen=True)
class KappaMatrix:
    """What the template needs to draw it: judges below each other, what they are compared with side by side."""

    title: str
    summary: str
    rows: list[Tick]
    columns: list[Tick]
    cells: list[Cell]
    width: float
    height: float
    head: float
    is_sloped: bool
    cell_width: int = CELL_WIDTH
    cell_height: int = CELL_HEIGHT


def kappa_matrix(title: str, agreements: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> KappaMatrix | None:
    """Return the matrix of one pair of models, or None where nothing was compared.

    Args:
        agreements: as in the judge stage's manifest: `first` (a judge), `second` (a judge or a metric), `kappa`, `low`, `high`.
        names: {metric: how it is written}.
    """
    known = {(item["first"], item["second"]): item for item in agreements if item["kappa"] is not None}
    if not known:
        return None
    labels = max(LEAST_LABEL, *(LETTER_WIDTH * len(first) + 14 for first, _ in known))
    longest = LETTER_WIDTH * max(len(names.get(second, second)) for _, second in known)
    head = HEAD + SLOPE * longest if longest > CELL_WIDTH else HEAD
    rows = {first: head + CELL_HEIGHT * i for i, first in enumerate(dict.fromkeys(first for first, _ in known))}
    columns = {second: labels + CELL_WIDTH * i for i, second in enumerate(dict.fromkeys(second for _, second in known))}
    said = [f"{first} and {names.get(second, second)}: {number(item['kappa'], 2)}" for (first, second), item in known.items()]
    return KappaMatrix(
        title,
        "; ".join(said) + ".",
        [Tick(y, first) for first, y in rows.items()],
        [Tick(x, names.get(second, second)) for second, x in columns.items()],
        [_cell(columns[second], rows[first], item) for (first, second), item in known.items()],
        labels + CELL_WIDTH * len(columns) + (head if longest > CELL_WIDTH else 0),
        head + CELL_HEIGHT * len(rows),
        head,
        longest > CELL_WIDTH,
    )


def _cell(x: float, y: float, item: Mapping[str, Any]) -> Cell:
    interval = "" if item["low"] is None else f"{number(item['low'], 2)} to {number(item['high'], 2)}"
    return Cell(x, y, number(item["kappa"], 2), interval, round(max(0.0, min(1.0, item["kappa"])), 2))
