"""report.json: every number of the report, for machines, and the sentences it opens with."""

from collections import Counter
from typing import Any

from ray_jobs.core.records import HUMAN, OFFLINE, SCHEMA_VERSION, Comparison
from ray_jobs.judging.pairs import NOT_ASKED, pair_results
from ray_jobs.judging.results import SIMILARITY, describe_judge, rank_models
from ray_jobs.reporting.answer import answer_sentence, coverage_sentences, leading_judge, speaking_matches
from ray_jobs.reporting.comparisons import judges_of, pairs_of
from ray_jobs.reporting.findings import Finding, agreements, matches
from ray_jobs.reporting.languages import encoder_sentences, language_sentences, languages
from ray_jobs.reporting.measures import judging_facts, length_correlations, more_matches
from ray_jobs.reporting.run_files import RunFiles
from ray_jobs.reporting.sentences import agreement_sentence, loss_sentence, verdict_sentence
from ray_jobs.reporting.training_view import training_summary

MOST_REASONS = 5
OWN_FACTS = {"stage", "id", "settings", "inputs", "seconds", "driver_peak_bytes", "headline", "next"}


def summarise(run: RunFiles, comparisons: list[Comparison]) -> dict[str, Any]:
    """Return the report as JSON values; `answer` is its first sentence, `sentences` are those that follow."""
    found = sorted([*matches(comparisons), *more_matches(run)], key=lambda match: pairs_of(run).index((match["model_1"], match["model_2"])))
    agreed = agreements(comparisons, seed=run.seed)
    judges = [_judge(run, judge) for judge in judges_of(run)]
    spoken = languages(run, comparisons)
    sentences = _sentences(run, found, agreed, judges) + language_sentences(spoken, run.vectors) + encoder_sentences(spoken, _encoder(run))
    return {
        "schema_version": SCHEMA_VERSION,
        "run": run.name,
        "answer": sentences[0],
        "sentences": sentences[1:],
        "leading_judge": leading_judge(judges),
        "missing": run.missing,
        "outdated": run.outdated,
        "counts": {"questions": len(run.questions), **run.manifests.get("prepare", {}).get("counts", {})},
        "matches": found,
        "agreement": agreed,
        "judges": judges,
        "judging": judging_facts(run),
        "languages": spoken,
        "length_correlation": length_correlations(run),
        "ranking": {judge: rank_models(run.verdicts, judge, seed=run.seed) for judge in judges_of(run)},
        "losses": {stage: run.manifests.get(stage, {}).get("eval", {}) for stage in ("finetune", "distill")},
        "training": training_summary(run),
        "compression": run.compression,
        "stages": {name: _stage(manifest) for name, manifest in run.manifests.items()},
        "provenance": run.provenance,
    }


def _sentences(run: RunFiles, found: list[Finding], agreed: list[Finding], judges: list[Finding]) -> list[str]:
    """The answer, one sentence for each further pair, what the budget left out, and how far judge and similarity agree."""
    spoken = speaking_matches(found, judges)
    if not spoken:
        return [loss_sentence(run.manifests)]
    first, leading = spoken[0], spoken[0]["judge"]
    same_pair = [match for match in found if (match["model_1"], match["model_2"]) == (first["model_1"], first["model_2"])]
    similarity = next((match for match in same_pair if match["metric"] == SIMILARITY), None)
    usability = next(judge["card"]["usability"] for judge in judges if judge["judge"] == leading)
    doubts = [agreement_sentence(item) for item in agreed if item["judge"] == leading and item["num_questions"]][:1]
    return [
        answer_sentence(first, similarity, usability),
        *(verdict_sentence(match) for match in spoken[1:]),
        *coverage_sentences(judges),
        *doubts,
    ]


def _judge(run: RunFiles, judge: str) -> Finding:
    rows = [row for row in run.verdicts if row["judge"] == judge]
    results = pair_results(rows, judge)
    scored = [result for result in results if result.winner is not None]
    costs = [row["cost_usd"] for row in rows if row["raw"] or row["prompt_tokens"]]  # the others were settled by rule, or never asked
    return {
        "judge": judge,
        "rubric_sha": sorted({row["rubric_sha"] for row in rows}),
        "verdicts": len(rows),
        "unscored": sum(row["winner"] is None for row in rows),
        "unscored_reasons": dict(Counter(row["unscored"] for row in rows if row["winner"] is None).most_common(MOST_REASONS)),
        "pairs": len(results),
        "not_asked": sum(result.winner is None and result.unscored.startswith(NOT_ASKED) for result in results),
        "consistent_share": sum(result.consistent for result in scored) / len(scored) if scored else None,
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "cost_usd": sum(costs) if costs and None not in costs else None,
        "card": _card(run, judge),
    }


def _encoder(run: RunFiles) -> str | None:
    told = run.manifests.get("judge", {}).get("judges", []) if OFFLINE in judges_of(run) else []
    return next((entry.get("model") for entry in told if entry["name"] == OFFLINE), None)


def _card(run: RunFiles, judge: str) -> Finding:
    """The card of the judge stage, which alone knows its canaries; where it wrote none, what the verdicts tell."""
    told = next((entry for entry in run.manifests["judge"].get("judges", []) if entry["name"] == judge), {})
    human = HUMAN if HUMAN in judges_of(run) and judge != HUMAN else None
    return told.get("card") or describe_judge(run.verdicts, judge, run.similarities, seed=run.seed, human=human)


def _stage(manifest: dict[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in manifest.items() if key not in OWN_FACTS}
    return {**{key: manifest.get(key) for key in ("id", "seconds", "driver_peak_bytes", "inputs", "settings")}, "facts": facts}
