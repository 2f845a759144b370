"""What sides with a model beside judges and cosine: the other similarities, and the longer answer as the control."""

from collections.abc import Mapping
from typing import Any

from scipy import stats

from ray_jobs.judging.results import METRICS, SIMILARITY, metric_winners
from ray_jobs.reporting.comparisons import SIDE_OF, pairs_of
from ray_jobs.reporting.findings import Finding, match_of
from ray_jobs.reporting.run_files import RunFiles

IN_WORDS = {
    "sif_cosine": "SIF cosine",
    "soft_cosine": "soft cosine",
    "token_f1": "token F1",
    "content_f1": "content-word F1",
    "longer": "longer answer",
}
MIN_FOR_RHO = 10
"""Answers below which a rank correlation says nothing."""


def more_matches(run: RunFiles) -> list[Finding]:
    """Return for each pair of models one row of `matches` for each metric but the cosine that has values."""
    found = []
    for pair in pairs_of(run):
        for metric, column in METRICS.items():
            if metric != SIMILARITY and any(row.get(column) is not None for row in run.similarities):
                winners = metric_winners(run.similarities, *pair, column=column, tie_band=_tie_band(run, column))
                found.append(match_of(pair, None, IN_WORDS.get(metric, metric), [SIDE_OF[w] for w in winners.values()], metric=metric))
    return found


def _tie_band(run: RunFiles, column: str) -> float:
    scales = run.manifests.get("judge", {}).get("similarity", {}).get("scales", {})
    return float(scales.get(column, {}).get("tie_band", 0.0))


def judging_facts(run: RunFiles) -> list[Mapping[str, Any]]:
    """Return what the judge stage says of each pair of models; an older stage says less, or nothing."""
    return list(run.manifests.get("judge", {}).get("pairs", []))


def length_correlations(run: RunFiles) -> dict[str, float]:
    """Return {model: Spearman's rho of its cosines with its answers' numbers of words}: how far similarity is length."""
    found = {}
    for model in run.answers:
        rows = [row for row in run.similarities if row["model"] == model and row["cosine"] is not None]
        columns = [row["num_tokens"] for row in rows], [row["cosine"] for row in rows]
        if len(rows) >= MIN_FOR_RHO and all(len(set(column)) > 1 for column in columns):
            found[model] = float(stats.spearmanr(*columns).statistic)
    return found
