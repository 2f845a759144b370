"""How a run was trained: memory against its limit and prediction, tokens a second, and where the time went."""

from collections.abc import Iterator, Mapping
from statistics import fmean, median
from typing import Any, NamedTuple

from ray_jobs.reporting.numbers_in_words import number, percent, size
from ray_jobs.reporting.run_files import Rows, RunFiles

STAGES = {"finetune": "Fine-tuning", "distill": "Distillation"}
PARTS = ("data", "forward", "backward", "optimizer", "other")
BAR_WIDTH = 480


class Segment(NamedTuple):
    """One part of a stacked bar: its place in SVG units."""

    name: str
    share: float
    x: float
    width: float


def training_summary(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Return the figures of each training stage that has finished; what an older run did not measure is None or empty.

    Returns:
        {stage: tokens_per_s and tokens_per_s_per_worker (medians over the lines), shares of time (means),
        host_peak_bytes and gpu_peak_bytes (one for each worker), memory (limits and predictions)}.
    """
    rows = {"finetune": run.finetune_steps, "distill": run.distill_steps}
    return {stage: _stage(run.manifests[stage], rows[stage]) for stage in STAGES if stage in run.manifests}


def _stage(manifest: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    lines = [row for row in rows if "loss" in row]
    rate, rate_each = (_over(lines, key, median) for key in ("tokens_per_s", "tokens_per_s_per_worker"))
    timed = [row["shares"] for row in lines if "shares" in row]
    return {
        "tokens_per_s": rate,
        "tokens_per_s_per_worker": rate_each,
        "shares": {part: fmean(shares[part] for shares in timed) for part in timed[0]} if timed else {},
        "host_peak_bytes": _listed(manifest.get("peak_bytes")),
        "gpu_peak_bytes": [peak for peak in _listed(manifest.get("gpu_peak_bytes")) if peak],
        "memory": manifest.get("memory") or {},
    }


def _over(lines: Rows, key: str, mean: Any) -> float | None:
    found = [line[key] for line in lines if line.get(key) is not None]
    return mean(found) if found else None


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def training_view(summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each stage `name`, `facts` ready to print, `bar` (segments) and `bar_in_words`; stages with no figure are left out."""
    views = [_view(STAGES[stage], found) for stage, found in summary.items()]
    return [view for view in views if view["facts"]]


def _view(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    bar = list(_segments(found["shares"]))
    words = ", ".join(f"{segment.name} {percent(segment.share)}" for segment in bar)
    return {"name": name, "facts": list(_facts(found)), "bar": bar, "bar_in_words": words, "width": BAR_WIDTH}


def _segments(shares: Mapping[str, float]) -> Iterator[Segment]:
    whole = sum(shares.get(part, 0.0) for part in PARTS)
    x = 0.0
    for part in PARTS if whole else ():
        width = BAR_WIDTH * shares.get(part, 0.0) / whole
        yield Segment(part, shares.get(part, 0.0), round(x, 1), round(width, 1))
        x += width


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if found["tokens_per_s"] is not None:
        each = found["tokens_per_s_per_worker"]
        yield "Tokens a second", number(found["tokens_per_s"], 0) + (f" ({number(each, 0)} a worker)" if each else "")
    if found["shares"].get("communication"):
        yield "Communication under way (sampled; inside the parts of the bar)", percent(found["shares"]["communication"], 1)
    for kind, title in (("host", "Peak memory of each worker"), ("gpu", "Peak GPU memory of each worker")):
        if peaks := found[f"{kind}_peak_bytes"]:
            yield title, ", ".join(size(peak) for peak in peaks) + _against(max(peaks), found["memory"].get(kind) or {})


def _against(peak: int, memory: Mapping[str, int | None]) -> str:
    limit, predicted = memory.get("limit_bytes"), memory.get("predicted_bytes")
    said = [f"limit {size(limit)}"] * bool(limit)
    if predicted:
        said.append(f"planned {size(predicted)}, measured {percent(peak / predicted)} of it")
    return f" ({'; '.join(said)})" if said else ""
