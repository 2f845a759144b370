"""The memory plan as lines of text."""

from typing import Any

from ray_jobs.training.alternatives import WORKER_COUNTS, Limits, OverWorkers
from ray_jobs.training.memory_plan import PARTS, Memory

GB = 10**9


def row_of(job: str, memory: Memory, limits: Limits) -> dict[str, Any]:
    """Return a plan as one JSON object."""
    return {"job": job, **memory._asdict(), "total": memory.total, "host_total": memory.host_total, "fits": limits.hold(memory)}


def method_table(rows: list[dict[str, Any]], *, first: str | None, configured: str | None = None) -> list[str]:
    """Return a table of what `row_of` gave, in GB; columns in which nothing stands are left out."""
    columns = [name for name in PARTS if any(row[name] for row in rows)]
    on_gpu = any(row["host_overhead"] for row in rows)
    width = max(len("GB per worker"), *(len(row["method"]) for row in rows)) + 2
    head = [f"{'GB per worker':<{width}}", *(f"{name:>{_wide(name)}}" for name in columns), f"{'total':>8}", *([f"{'host':>6}"] * on_gpu)]
    lines = [" ".join([*head, " fits"])]
    for row in rows:
        cells = [f"{row[name] / GB:>{_wide(name)}.3f}" if row[name] else f"{'-':>{_wide(name)}}" for name in columns]
        host = [f"{row['host_total'] / GB:>6.2f}"] * on_gpu
        label = f"{'* ' if row['method'] == configured else '  '}{row['method']}"
        mark = "  <- first that fits" if row["method"] == first else ""
        lines.append(
            " ".join([f"{label:<{width}}", *cells, f"{row['total'] / GB:>8.2f}", *host, f"{'yes' if row['fits'] else 'no':>5}"]) + mark
        )
    return lines


def workers_table(name: str, table: list[OverWorkers], limits: Limits) -> list[str]:
    """Return the GB of one worker by strategy and number of workers, each row up to the first that fits."""
    longest = max(len(row.memories) for row in table)
    title = f"{name}, GB per worker of"
    width = max(len(title), *(len(row.sharding.name) + 2 for row in table))
    lines = [f"{title:<{width}} " + " ".join(f"{count:>7}" for count in WORKER_COUNTS[:longest])]
    for row in table:
        label = f"{'  ' + row.sharding.name:<{width}}"
        if row.obstacle:
            lines.append(f"{label}   cannot start: {row.obstacle}")
            continue
        cells = " ".join(f"{memory.total / GB:>7.2f}" for memory in row.memories)
        lines.append(f"{label} {cells}{'  <- first that fits' if limits.hold(row.memories[-1]) else '  does not fit'}")
    return lines


def _wide(name: str) -> int:
    return max(7, len(name))
