"""The rows of the page's question browser: each question once, each answer once, and what each pair came to."""

from collections.abc import Iterable
from typing import Any

from ray_jobs.core.records import Comparison
from ray_jobs.reporting.comparisons import SIDE_OF, judges_of, pairs_of, results_of
from ray_jobs.reporting.run_files import RunFiles
from ray_jobs.reporting.sentences import NAMES

QUESTION_KEYS = ("question_id", "question", "reference", "topic", "language")
TEXT_KEYS = ("question", "reference")
ANSWER_KEYS = ("answer_id", "finish_reason", "error", "completion_tokens")
SCORE_KEYS = ("cosine", "sif_cosine", "token_f1", "oov_share", "reason")
MOST_CHARACTERS = 20_000
"""Longest text in the page: one answer of 200 kB would outweigh a hundred ordinary ones, and nobody reads it here."""
DECIMALS = 6


def browser(run: RunFiles, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Return what the page's script reads: the models' names, the pairs, the filters' values and the questions."""
    return {
        "run": run.name,
        "models": NAMES,
        "pairs": [{"key": _key(a, b), "model_1": a, "model_2": b} for a, b in pairs_of(run)],
        "judges": judges_of(run),
        "topics": sorted({question["topic"] for question in run.questions} - {""}),
        "languages": sorted({question["language"] for question in run.questions}),
        "questions": _questions(run, _met(run, comparisons)),
    }


def _key(model_1: str, model_2: str) -> str:
    return f"{model_1} {model_2}"


def _met(run: RunFiles, comparisons: Iterable[Comparison]) -> dict[str, dict[str, Any]]:
    """Return {question_id: {pair: similarity's winner and margin, and each judge's word}}."""
    met: dict[str, dict[str, Any]] = {question["question_id"]: {} for question in run.questions}
    results, said = results_of(run), _said(run)
    for row in comparisons:
        first: dict[str, Any] = {"cos_winner": row.cos_winner, "margin": _margin(row), "judged": {}}
        entry = met[row.question_id].setdefault(_key(row.model_1, row.model_2), first)
        result = results.get((row.judge, row.model_1, row.model_2, row.question_id))
        if result:
            spoken = said[row.judge, row.model_1, row.model_2, row.question_id]
            entry["judged"][row.judge] = {"winner": row.llm_winner, "consistent": result.consistent, "said": spoken}
    return met


def _said(run: RunFiles) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    """Return what a judge said of a pair, each opinion once: `first` are the answers read first when it said so."""
    said: dict[tuple[str, str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in sorted(run.verdicts, key=lambda row: (row["swapped"], row["repeat"])):
        winner, flag = SIDE_OF[row["winner"]], row.get("flag")
        text = cut(row["explanation"] or row["unscored"]) + (f"\n[Flagged: {flag}]" if flag else "")
        opinions = said.setdefault((row["judge"], row["model_a"], row["model_b"], row["question_id"]), {})
        opinion = opinions.setdefault((winner, text), {"winner": winner, "text": text, "first": []})
        opinion["first"].append(2 if row["swapped"] else 1)
    return {key: list(opinions.values()) for key, opinions in said.items()}


def cut(text: str) -> str:
    """Return a text as it is, or its beginning and a note of what was left out."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} […] [cut here by the report: {MOST_CHARACTERS:,} of {len(text):,} characters]"


def _margin(row: Comparison) -> float | None:
    if row.similarity_1 is None or row.similarity_2 is None:
        return None
    return round(row.similarity_1 - row.similarity_2, DECIMALS)


def _questions(run: RunFiles, met: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    scores = {(row["model"], row["question_id"]): {key: _rounded(row[key]) for key in SCORE_KEYS} for row in run.similarities}

    def answers(question_id: str) -> dict[str, dict[str, Any]]:
        given = {model: rows[question_id] for model, rows in run.answers.items() if question_id in rows}
        return {
            model: {"text": cut(row["text"])} | {key: row[key] for key in ANSWER_KEYS} | scores.get((model, question_id), {})
            for model, row in given.items()
        }

    return [
        {
            "ordinal": ordinal,
            **{key: cut(question[key]) if key in TEXT_KEYS else question[key] for key in QUESTION_KEYS},
            "answers": answers(question["question_id"]),
            "met": met[question["question_id"]],
        }
        for ordinal, question in enumerate(run.questions, start=1)
    ]


def _rounded(value: Any) -> Any:
    return round(value, DECIMALS) if isinstance(value, float) else value
