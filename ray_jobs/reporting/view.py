"""What the page shows beside report.json: plots, and tables ready to print."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ray_jobs.core.records import Comparison
from ray_jobs.reporting.browser import browser
from ray_jobs.reporting.charts import Chart, Points, line_chart
from ray_jobs.reporting.comparisons import pairs_of
from ray_jobs.reporting.compression_view import compression_view
from ray_jobs.reporting.findings import SCORED
from ray_jobs.reporting.numbers_in_words import number, percent, size
from ray_jobs.reporting.run_files import Rows, RunFiles
from ray_jobs.reporting.sentences import NAMES, judge_in_words, name, power_sentence
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
        "answer": [summary["answer"], *summary["sentences"]],
        "facts": list(_facts(summary)),
        "missing": run.missing,
        "outdated": run.outdated,
        "matches": summary["matches"],
        "power": [power_sentence(match) for match in summary["matches"] if match["questions_needed"]],
        "agreement": [_agreement(item, pairs_of(run)) for item in summary["agreement"]],
        "judges": [_judge(judge, run) for judge in summary["judges"]],
        "similarity": _similarity(run),
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
    return {**item, "labels": labels, "pair_index": pairs.index((item["model_1"], item["model_2"]))}


def _judge(judge: Mapping[str, Any], run: RunFiles) -> dict[str, Any]:
    manifest = run.manifests["judge"]
    told: Mapping[str, Any] = next((entry for entry in manifest.get("judges", []) if entry["name"] == judge["judge"]), {})
    usability = judge["card"]["usability"]
    facts: Items = [
        ("Can it be believed?", f"{usability['word']}: {'; '.join(usability['reasons'])}" if usability["reasons"] else usability["word"]),
        ("Verdicts", f"{number(judge['verdicts'])} over {number(judge['pairs'])} pairs of answers, each in both orders"),
        ("Not scored", number(judge["unscored"])),
        # the coverage judge scores each answer by itself, so its winner cannot depend on the order
        *([] if judge["judge"] == "coverage" else [("Same winner in both orders", percent(judge["consistent_share"]))]),
        ("Rubric (hash)", ", ".join(judge["rubric_sha"])),
    ]
    if judge["prompt_tokens"]:
        facts.append(("Tokens read and written", f"{number(judge['prompt_tokens'])} and {number(judge['completion_tokens'])}"))
        cost = judge["cost_usd"]
        facts.append(("Cost", "unknown (no price in the config)" if cost is None else f"{cost:.2f} USD"))
    return {"name": judge["judge"], "kind": judge_in_words(judge["judge"], told, manifest["settings"]), "facts": facts}


def _similarity(run: RunFiles) -> dict[str, Any] | None:
    if not run.similarities:
        return None
    told = run.manifests["judge"].get("similarity", {})
    facts: Items = [
        ("Word vectors", told.get("vectors")),
        ("Mean cosine to the question's own sample answer", number(told.get("right_mean"), 4)),
        ("Mean cosine to other questions' sample answers", number(told.get("wrong_mean"), 4)),
        ("Differences up to this count as a tie", number(run.tie_band, 5)),
        ("Answers without a score", f"{sum(row['cosine'] is None for row in run.similarities)} of {len(run.similarities)}"),
        *_unknown_words(run),
    ]
    return {"kind": SIMILARITY_IN_WORDS, "facts": facts}


def _unknown_words(run: RunFiles) -> Items:
    """Share of words without a vector by the question's language: English vectors know hardly any German words."""
    language_of = {question["question_id"]: question["language"] for question in run.questions}
    shares: dict[str, list[float]] = {}
    for row in run.similarities:
        shares.setdefault(language_of.get(row["question_id"], "?"), []).append(row["oov_share"])
    return [(f"Words without a vector, language {key}", percent(sum(found) / len(found))) for key, found in sorted(shares.items())]


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
