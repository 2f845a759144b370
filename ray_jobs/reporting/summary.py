"""report.json: every number of the report, for machines, and the sentences it opens with."""

from typing import Any

from ray_jobs.core.records import SCHEMA_VERSION, Comparison
from ray_jobs.judging.pairs import pair_results
from ray_jobs.judging.results import describe_judge, rank_models
from ray_jobs.reporting.comparisons import judges_of
from ray_jobs.reporting.findings import agreements, matches
from ray_jobs.reporting.run_files import RunFiles
from ray_jobs.reporting.sentences import agreement_sentence, loss_sentence, verdict_sentence
from ray_jobs.reporting.training_view import training_summary

OWN_FACTS = {"stage", "id", "settings", "inputs", "seconds", "driver_peak_bytes", "headline", "next"}


def summarise(run: RunFiles, comparisons: list[Comparison]) -> dict[str, Any]:
    """Return the report as JSON values; `answer` is its first sentence, `sentences` are those that follow."""
    found, agreed = matches(comparisons), agreements(comparisons, seed=run.seed)
    sentences = _sentences(run, found, agreed)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": run.name,
        "answer": sentences[0],
        "sentences": sentences[1:],
        "missing": run.missing,
        "outdated": run.outdated,
        "counts": {"questions": len(run.questions), **run.manifests.get("prepare", {}).get("counts", {})},
        "matches": found,
        "agreement": agreed,
        "judges": [_judge(run, judge) for judge in judges_of(run)],
        "ranking": {judge: rank_models(run.verdicts, judge, seed=run.seed) for judge in judges_of(run)},
        "losses": {stage: run.manifests.get(stage, {}).get("eval", {}) for stage in ("finetune", "distill")},
        "training": training_summary(run),
        "compression": run.compression,
        "stages": {name: _stage(manifest) for name, manifest in run.manifests.items()},
        "provenance": run.provenance,
    }


def _sentences(run: RunFiles, found: list[dict[str, Any]], agreed: list[dict[str, Any]]) -> list[str]:
    """One sentence a pair from the first judge, then how far the two measures agree on the first pair."""
    first_judge = next(iter(judges_of(run)), None)
    verdicts = [verdict_sentence(match) for match in found if match["judge"] and match["judge"] == first_judge]
    doubts = [agreement_sentence(item) for item in agreed[:1] if item["num_questions"]]
    return [*verdicts, *doubts] or [loss_sentence(run.manifests)]


def _judge(run: RunFiles, judge: str) -> dict[str, Any]:
    rows = [row for row in run.verdicts if row["judge"] == judge]
    results = pair_results(rows, judge)
    scored = [result for result in results if result.winner is not None]
    costs = [row["cost_usd"] for row in rows if row["cost_usd"] is not None]
    return {
        "judge": judge,
        "rubric_sha": sorted({row["rubric_sha"] for row in rows}),
        "verdicts": len(rows),
        "unscored": sum(row["winner"] is None for row in rows),
        "pairs": len(results),
        "consistent_share": sum(result.consistent for result in scored) / len(scored) if scored else None,
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "cost_usd": sum(costs) if costs else None,
        "card": describe_judge(run.verdicts, judge, run.similarities, seed=run.seed),
    }


def _stage(manifest: dict[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in manifest.items() if key not in OWN_FACTS}
    return {**{key: manifest.get(key) for key in ("id", "seconds", "driver_peak_bytes", "inputs", "settings")}, "facts": facts}
