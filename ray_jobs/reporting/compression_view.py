"""The compression table as the page shows it: named columns in a fixed order, and size, speed and quality as one plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ray_jobs.reporting.charts import bubble_chart
from ray_jobs.reporting.numbers_in_words import NONE, number, percent, size

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One column: the key in table.json, its title, and how a value is written."""

    key: str
    title: str
    write: Callable[[Any], str]
    numeric: bool = True


def _text(value: Any) -> str:
    return NONE if value in (None, "") else str(value)


def _milliseconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{1000 * seconds:,.0f}\u202fms"


COLUMNS = (
    Column("name", "Model", _text, numeric=False),
    Column("engine", "Engine", _text, numeric=False),
    Column("precision", "Precision", _text, numeric=False),
    Column("device", "Device", _text, numeric=False),
    Column("size_bytes", "Size", size),
    Column("load_s", "Load", _milliseconds),
    Column("first_token_s", "First token", _milliseconds),
    Column("answer_p50_s", "Answer p50", _milliseconds),
    Column("answer_p95_s", "Answer p95", _milliseconds),
    Column("tokens_per_s", "Tokens/s", lambda value: number(value, 1)),
    Column("nats", "Held-out loss", number),
    Column("kl_nats", "KL to float32", number),
    Column("agreement", "Same next token", lambda share: percent(share, 1)),
    Column("threads", "Threads", number),
)


def compression_view(rows: Sequence[Row]) -> dict[str, Any]:
    """Return `columns` (those that some row fills), `rows` of written cells, `caption` and `chart`."""
    columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    return {
        "columns": columns,
        "rows": [[column.write(row.get(column.key)) for column in columns] for row in rows],
        "caption": "Measured on this run's machine; held-out loss and KL in nats per token, lower is better.",
        "chart": _chart(rows),
    }


def _chart(rows: Sequence[Row]) -> Any:
    points = [
        (row["name"], row["tokens_per_s"], row["nats"], row["size_bytes"])
        for row in rows
        if None not in (row.get("tokens_per_s"), row.get("nats"), row.get("size_bytes"))
    ]
    return bubble_chart(
        "Speed, quality and size", points, x_label="tokens per second", y_label="held-out loss in nats per token; area: size on disk"
    )
