"""The compression table as the page shows it: named columns in a fixed order, and size, speed and quality as one plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ray_jobs.reporting.charts import Chart, Point, bubble_chart
from ray_jobs.reporting.numbers_in_words import NONE, number, percent, size
from ray_jobs.reporting.sentences import NAMES, name

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
    Column("name", "Model", name, numeric=False),
    Column("engine", "Engine", _text, numeric=False),
    Column("precision", "Precision", _text, numeric=False),
    Column("device", "Device", _text, numeric=False),
    Column("size_bytes", "Size", size),
    Column("load_s", "Load", _milliseconds),
    Column("first_token_s", "First token", _milliseconds),
    Column("answer_p50_s", "Answer p50", _milliseconds),
    Column("answer_p95_s", "Answer p95", _milliseconds),
    Column("tokens_per_s", "Tokens/s", lambda value: number(value, 1)),
    Column("speedup", "Speed", lambda ratio: NONE if ratio is None else f"{ratio:.2f}×"),
    Column("loss_nats", "Held-out loss", lambda nats: number(nats, 3)),
    Column("kl_nats", "KL to the student", lambda nats: number(nats, 4)),
    Column("agreement", "Same token", lambda share: percent(share, 1)),
)


def compression_view(rows: Sequence[Row]) -> dict[str, Any]:
    """Return `columns` (those that some row fills; the device where there are several), `rows` of written cells, `caption` and `chart`."""
    columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    if len({row.get("device") for row in rows}) == 1:
        columns = [column for column in columns if column.key != "device"]
    return {
        "columns": columns,
        "rows": [[column.write(row.get(column.key)) for column in columns] for row in rows],
        "caption": _caption(rows),
        "chart": _chart(rows),
    }


def _caption(rows: Sequence[Row]) -> str:
    """Say where and how it was measured, as far as the rows tell."""
    where = "; ".join(sorted({f"{row['device']}, {row['threads']} threads" for row in rows if row.get("device") and row.get("threads")}))
    answers = sorted({f"{row['num_answers']} answers of {row['new_tokens']} tokens" for row in rows if row.get("num_answers")})
    timed = f"Medians over {answers[0]}" + (f" on {where}. " if where else ". ") if answers else ""
    return f"{timed}Held-out loss and KL in nats per token: lower is better. Speed is against the plain student."


def _chart(rows: Sequence[Row]) -> Chart | None:
    points = [_point(row) for row in rows if all(row.get(key) is not None for key in ("tokens_per_s", "loss_nats", "size_bytes"))]
    y_label = "held-out loss in nats per token; area: size on disk"
    return bubble_chart("Speed, quality and size", points, x_label="tokens per second", y_label=y_label)


def _point(row: Row) -> Point:
    model = row["name"].partition("-")[0]
    kind = model if model in NAMES else "student"
    return Point(name(row["name"]), row["tokens_per_s"], row["loss_nats"], row["size_bytes"], kind)
