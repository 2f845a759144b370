"""What the page shows beside report.json: plots, and tables ready to print."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ray_jobs.core.records import Comparison
from ray_jobs.judging.results import SIMILARITY
from ray_jobs.reporting.browser import browser
from ray_jobs.reporting.charts import Chart, Points, line_chart
from ray_jobs.reporting.comparisons import pairs_of
from ray_jobs.reporting.compression_view import compression_view
from ray_jobs.reporting.evidence_view import evidence_view
from ray_jobs.reporting.findings import SCORED
from ray_jobs.reporting.judge_view import judge_view, jury_sentences
from ray_jobs.reporting.languages import language_name
from ray_jobs.reporting.measures import IN_WORDS, judging_facts
from ray_jobs.reporting.numbers_in_words import NONE, number, size
from ray_jobs.reporting.run_files import Rows, RunFiles
from ray_jobs.reporting.sentences import NAMES, name, power_sentence, who_judges
from ray_jobs.reporting.training_view import training_view

Items = list[tuple[str, Any]]
TERMS = {"kl": "KL to the teacher", "ce": "cross-entropy", "ce_teacher": "the teacher's cross-entropy"}
SIMILARITY_IN_WORDS = (
    "The cosine of the mean word vectors of an answer and its sample answer. It sees which words are used, not whether the sentence "
    "is right. Its scale is narrow: compare the means below, and read each difference with its margin."
)
LOSSES = (
    ("finetune", "Fine-tuning: base, then fine-tuned", "base_nats", "teacher_nats"),
    ("distill", "Distillation: the student's KL to the teacher", "kl_before_nats", "kl_after_nats"),
    ("distill", "Distillation: the student's cross-entropy", "ce_before_nats", "ce_after_nats"),
)


def page_context(run: RunFiles, summary: Mapping[str, Any], comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Return what templates/report.html.jinja needs."""
    curves = (learning_curves("Fine-tuning", run.finetune_steps), learning_curves("Distillation", run.distill_steps))
    return {
        "run": run.name,
        "names": NAMES,
        "claim": summary["answer"].partition(": ")[0] if ": " in summary["answer"] else summary["answer"],
        "evidence": summary["answer"].partition(": ")[2].replace("p = ", "p\u00a0=\u00a0"),
        "sentences": summary["sentences"],
        "facts": [*_totals(summary), *_facts(summary)],
        "missing": run.missing,
        "outdated": run.outdated,
        "matches": summary["matches"],
        "power": [power_sentence(match) for match in _named(summary["matches"]) if match["questions_needed"]],
        "agreement": [_agreement(item, pairs_of(run)) for item in summary["agreement"] if item["num_questions"]],
        "leading": summary["leading_judge"],
        "evidence_plots": evidence_view(run, summary),
        "jury": jury_sentences(summary["judging"]),
        "judges": [judge_view(judge, run) for judge in summary["judges"]],
        "similarity": _similarity(run),
        "languages": _languages(summary["languages"], summary["leading_judge"]),
        "curves": [curve for curve in curves if curve],
        "losses": list(_losses(summary["losses"])),
        "training": training_view(summary["training"]),
        "compression": compression_view(run.compression),
        "browser": browser(run, comparisons),
        "data_counts": _counts(summary["counts"]) if "prepare" in run.manifests else [],
        "stages": [_stage(key, stage) for key, stage in summary["stages"].items()],
        "versions": _versions(run.provenance),
    }


def learning_curves(title: str, steps: Rows) -> Chart | None:
    """Return the plot of a metrics.jsonl: training and held-out loss by step, each term apart where there are several."""
    terms = sorted({term for row in steps for term in row.get("terms", {})})
    curves: dict[str, Points] = {}
    for term in terms if len(terms) > 1 else [None]:
        label = TERMS.get(term, term) if term else "loss"
        curves[f"{label}, training"] = _series(steps, "loss", "terms", term)
        curves[f"{label}, held out"] = _series(steps, "eval_loss", "eval_terms", term)
    return line_chart(title, curves, x_label="step", y_label="nats per token")


def _series(steps: Rows, total: str, parts: str, term: str | None) -> Points:
    return [
        (float(row["step"]), float(row[parts][term] if term else row[total]))
        for row in steps
        if row.get(total) is not None and (term is None or term in row.get(parts, {}))
    ]


def _named(matches: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of judges and of the cosine; the other similarities stand in the tables alone."""
    return [match for match in matches if match["judge"] or match["metric"] == SIMILARITY]


def _totals(summary: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Who won, by the leading judge and by similarity, on the first pair."""
    matches = summary["matches"]
    first = [match for match in matches if (match["model_1"], match["model_2"]) == (matches[0]["model_1"], matches[0]["model_2"])]
    for match in _named(first):
        if match["judge"] in (None, summary["leading_judge"]):
            undecided = [f"{number(match[key])} {word}" for key, word in (("ties", "ties"), ("unscored", "not scored")) if match[key]]
            sides = f"{name(match['model_2'])} : {name(match['model_1'])}, of {number(summary['counts']['questions'])} questions"
            yield _fact(f"Winner by {match['measure']}", f"{match['wins_2']}\u202f:\u202f{match['wins_1']}", "; ".join([sides, *undecided]))


def _facts(summary: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    finetune, distill = summary["losses"]["finetune"], summary["losses"]["distill"]
    yield _fact("Questions", number(summary["counts"]["questions"]), "each with a sample answer")
    if finetune.get("teacher_nats") is not None:
        note = f"nats a token; base {number(finetune['base_nats'], 3)}"
        yield _fact("Fine-tuned, held-out loss", number(finetune["teacher_nats"], 3), note)
    if distill.get("kl_after_nats") is not None:
        note = f"nats a token; freshly cut {number(distill['kl_before_nats'], 3)}"
        yield _fact("Student, KL to the teacher", number(distill["kl_after_nats"], 3), note)
    sizes = [row for row in summary["compression"] if row.get("size_bytes")]
    if sizes:
        smallest = min(sizes, key=lambda row: row["size_bytes"])
        yield _fact("Smallest variant", size(smallest["size_bytes"]), smallest["name"])


def _fact(label: str, figure: str, note: str) -> dict[str, str]:
    return {"label": label, "figure": figure, "note": note}


def _agreement(item: Mapping[str, Any], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    words = {"1": name(item["model_1"]), "2": name(item["model_2"]), "tie": "tie"}
    labels = [{"key": side, "text": words[side]} for side in SCORED]
    return {**item, "labels": labels, "who": who_judges(item["judge"]), "pair_index": pairs.index((item["model_1"], item["model_2"]))}


def _similarity(run: RunFiles) -> dict[str, Any] | None:
    if not run.similarities:
        return None
    told = run.manifests["judge"].get("similarity", {})
    facts: Items = [
        ("Word vectors", told.get("vectors")),
        *([] if told.get("scales") else _scale_of_cosine(told, run.tie_band)),
        ("Answers without a score", f"{sum(row['cosine'] is None for row in run.similarities)} of {len(run.similarities)}"),
    ]
    return {"kind": SIMILARITY_IN_WORDS, "facts": facts, "scales": list(_scales(told.get("scales", {}), judging_facts(run)))}


def _scale_of_cosine(told: Mapping[str, Any], tie_band: float) -> Items:
    return [
        ("Mean cosine to the question's own sample answer", number(told.get("right_mean"), 4)),
        ("Mean cosine to other questions' sample answers", number(told.get("wrong_mean"), 4)),
        ("Differences up to this count as a tie", number(tie_band, 5)),
    ]


def _scales(scales: Mapping[str, Any], judged: list[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Return one written line a metric: what its values mean in this run, and how far apart the first pair's are."""
    margins = judged[0].get("margins", {}) if judged else {}
    for metric, scale in scales.items():
        margin = margins.get(SIMILARITY if metric == "cosine" else metric, {}).get("median")
        figures = (scale["right_mean"], scale["wrong_mean"], margin, scale["tie_band"])
        yield [IN_WORDS.get(metric, metric), *(number(value, 4) for value in figures)]


def _languages(found: Iterable[Mapping[str, Any]], leading: str | None) -> dict[str, Any]:
    """Return `heads` (a pair of models by the leading judge or by similarity) and `rows`, one a language, with its `wins` below them."""
    heads: dict[str, None] = {}
    rows = []
    for entry in found:
        told = [match for match in _named(entry["matches"]) if match["judge"] in (None, leading)]
        wins = {f"{name(m['model_1'])} : ties : {name(m['model_2'])}, {m['measure']}": m for m in told}
        heads |= dict.fromkeys(wins)
        reasons = "; ".join(f"{reason} ({number(count)})" for reason, count in entry["reasons"].items())
        rows.append({**entry, "name": language_name(entry["language"]), "reasons": reasons, "told": wins})
    for row in rows:
        row["wins"] = [_wins(row["told"].get(head)) for head in heads]
    return {"heads": list(heads), "rows": rows}


def _wins(match: Mapping[str, Any] | None) -> str:
    return NONE if match is None else f"{match['wins_1']} : {match['ties']} : {match['wins_2']}"


def _losses(losses: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for stage, what, before, after in LOSSES:
        found = losses[stage]
        if found.get(before) is not None and found.get(after) is not None:
            yield {"what": what, "before": found[before], "after": found[after], "change": found[after] - found[before]}


def _counts(counts: Mapping[str, Any]) -> Items:
    items: Items = []
    for key, value in counts.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        items += [(f"{key} {part}".replace("_", " ").strip().capitalize(), number(amount)) for part, amount in parts]
    return items


def _stage(key: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    return {**stage, "name": key, "worker_peaks": [size(peak) for peak in _peaks(stage["facts"])]}


def _peaks(facts: Mapping[str, Any]) -> list[float]:
    """Return the peak bytes of the workers wherever a manifest states them: one number, or one a rank."""
    found: list[float] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            found += _peaks(value)
        elif key == "peak_bytes":
            found += value if isinstance(value, list) else [value]
    return found


def _versions(provenance: Mapping[str, Any]) -> Items:
    return [*provenance.get("versions", {}).items(), ("source revision", provenance.get("git_revision"))]
