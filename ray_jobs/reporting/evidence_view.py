"""The plots that stand behind the answer: wins with intervals, agreement, similarity against length, the ranking."""

from collections.abc import Iterator, Mapping
from typing import Any

from ray_jobs.reporting.comparisons import pairs_of
from ray_jobs.reporting.interval_chart import Interval, IntervalChart, interval_chart
from ray_jobs.reporting.kappa_matrix import KappaMatrix, kappa_matrix
from ray_jobs.reporting.measures import IN_WORDS
from ray_jobs.reporting.numbers_in_words import number, percent
from ray_jobs.reporting.run_files import RunFiles
from ray_jobs.reporting.scatter import Scatter, scatter
from ray_jobs.reporting.sentences import capital, name, who_judges

Finding = Mapping[str, Any]


def evidence_view(run: RunFiles, summary: Finding) -> dict[str, Any]:
    """Return `wins` and `agreement` (a plot each pair), `length` and `ranking` (a plot each judge, the leading one first)."""
    judges = sorted(summary["ranking"], key=lambda judge: judge != summary["leading_judge"])
    return {
        "wins": [chart for pair in pairs_of(run) if (chart := _wins(pair, summary))],
        "agreement": [chart for entry in summary["judging"] if (chart := _agreement(entry))],
        "length": _length(run, summary["length_correlation"]),
        "ranking": [chart for judge in judges if (chart := _ranking(judge, summary["ranking"][judge]))],
    }


def _wins(pair: tuple[str, str], summary: Finding) -> IntervalChart | None:
    told: Finding = next((entry for entry in summary["judging"] if (entry["model_a"], entry["model_b"]) == pair), {})
    intervals = []
    for match in summary["matches"]:
        if (match["model_1"], match["model_2"]) == pair:
            if match["win_rate"] is not None:
                kind = "" if match["judge"] else "metric"
                intervals.append(_share(match["measure"], match["win_rate"], match["low"], match["high"], kind))
            intervals += _graded(told.get("preferences", {}).get(match["judge"], {}))
    first, second = name(pair[0]), name(pair[1])
    title = f"{capital(first)} against {second}: the {second}'s share, with its 95\u202f% interval"
    sides = {"left_label": f"← {first} better", "right_label": f"{second} better →"}
    return interval_chart(title, intervals, reference=0.5, limits=(0.0, 1.0), shares=True, **sides)


def _graded(preference: Finding) -> Iterator[Interval]:
    """The judge's preference with ties as halves, and what it would be at equal length; the manifest states the first model's."""
    controlled = preference.get("length_controlled", {})
    for label, found, key in (("ties as halves", preference, "score"), ("at equal length", controlled, "rate")):
        if found.get(key) is not None:
            yield _share(label, 1 - found[key], 1 - found["high"], 1 - found["low"], "graded")


def _share(label: str, value: float, low: float, high: float, kind: str) -> Interval:
    return Interval(label, value, low, high, f"{percent(value)} ({percent(low)}–{percent(high)})", kind)


def _agreement(entry: Finding) -> KappaMatrix | None:
    first, second = name(entry["model_a"]), name(entry["model_b"])
    return kappa_matrix(f"{capital(first)} against {second}", entry.get("agreements", []), IN_WORDS)


def _length(run: RunFiles, rhos: Mapping[str, float]) -> Scatter | None:
    groups = {
        model: [
            (float(row["num_tokens"]), row["cosine"]) for row in run.similarities if row["model"] == model and row["cosine"] is not None
        ]
        for model in run.answers
    }
    notes = {model: f"{name(model)}, rank correlation {number(rhos[model], 2) if model in rhos else 'unknown'}" for model in groups}
    return scatter("Similarity against length", groups, notes, x_label="words of the answer", y_label="cosine to the sample answer")


def _ranking(judge: str, models: list[Finding]) -> IntervalChart | None:
    intervals = [
        Interval(
            name(entry["model"]),
            entry["strength"],
            entry["low"],
            entry["high"],
            f"{number(entry['strength'], 2)} ({number(entry['low'], 2)} to {number(entry['high'], 2)})",
            entry["model"],
        )
        for entry in models
    ]
    title = f"All models on one scale, by {who_judges(judge)}: log odds against the mean"
    return interval_chart(title, intervals, reference=0.0, left_label="← weaker", right_label="stronger →")
