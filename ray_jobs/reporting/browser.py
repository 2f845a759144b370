"""The rows of the page's question browser: each question once, each answer once, and what each pair came to."""

from collections.abc import Iterable
from typing import Any

from ray_jobs.core.records import Comparison
from ray_jobs.reporting.comparisons import judges_of, pairs_of, results_of
from ray_jobs.reporting.run_files import RunFiles
from ray_jobs.reporting.sentences import NAMES

QUESTION_KEYS = ("question_id", "question", "reference", "topic", "language")
ANSWER_KEYS = ("text", "finish_reason", "error", "completion_tokens")
SCORE_KEYS = ("cosine", "sif_cosine", "token_f1", "oov_share", "reason")
ORDER_NOTE = "The judge's verdict changed with the order of the two answers."


def browser(run: RunFiles, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Return what report.js reads: the models' names, the pairs, the filters' values and the questions."""
    return {
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
    results = results_of(run)
    for row in comparisons:
        first: dict[str, Any] = {"cos_winner": row.cos_winner, "margin": _margin(row), "judged": {}}
        entry = met[row.question_id].setdefault(_key(row.model_1, row.model_2), first)
        if row.judge:
            result = results.get((row.judge, row.model_1, row.model_2, row.question_id))
            note = ORDER_NOTE if result and not result.consistent else ""
            entry["judged"][row.judge] = {"winner": row.llm_winner, "explanation": row.explanation, "note": note}
    return met


def _margin(row: Comparison) -> float | None:
    if row.similarity_1 is None or row.similarity_2 is None:
        return None
    return row.similarity_1 - row.similarity_2


def _questions(run: RunFiles, met: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    scores = {(row["model"], row["question_id"]): {key: row[key] for key in SCORE_KEYS} for row in run.similarities}

    def answers(question_id: str) -> dict[str, dict[str, Any]]:
        given = {model: rows[question_id] for model, rows in run.answers.items() if question_id in rows}
        return {model: {key: row[key] for key in ANSWER_KEYS} | scores.get((model, question_id), {}) for model, row in given.items()}

    return [
        {
            "ordinal": ordinal,
            **{key: question[key] for key in QUESTION_KEYS},
            "answers": answers(question["question_id"]),
            "met": met[question["question_id"]],
        }
        for ordinal, question in enumerate(run.questions, start=1)
    ]
