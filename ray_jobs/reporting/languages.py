"""What each language of the questions got: answers without a cosine are counted and explained, not hidden."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from ray_jobs.core.records import Comparison
from ray_jobs.judging.coverage import ENGLISH_ENCODERS
from ray_jobs.reporting.findings import matches
from ray_jobs.reporting.run_files import Rows, RunFiles

NAMES = {"en": "English", "de": "German"}
WORTH_SAYING = 0.1
"""Share of a language's answers without a cosine from which the first screen says so."""
_SHARE = re.compile(r"^\d+% of (the (?:sample )?answer's words) have a vector, fewer than (\d+%)$")


def languages(run: RunFiles, comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Return for each language its questions, its answers without a cosine by reason, and who won by judge and similarity.

    Returns:
        [{`language`, `questions`, `answers`, `without_cosine`, `reasons` {reason: answers}, `unknown_words` (mean share,
        None without scores), `matches` (as in report.json, of this language's questions alone)}].
    """
    comparisons = list(comparisons)
    language_of = {question["question_id"]: question["language"] for question in run.questions}
    scored: dict[str, Rows] = {language: [] for language in sorted(set(language_of.values()))}
    for row in run.similarities:
        if row["question_id"] in language_of:
            scored[language_of[row["question_id"]]].append(row)
    asked = Counter(language_of.values())
    return [
        {
            "language": language,
            "questions": asked[language],
            **_scores(rows),
            "matches": matches(row for row in comparisons if row.language == language),
        }
        for language, rows in scored.items()
    ]


def _scores(rows: Rows) -> dict[str, Any]:
    without = [row for row in rows if row["cosine"] is None]
    return {
        "answers": len(rows),
        "without_cosine": len(without),
        "reasons": dict(Counter(_kind(row["reason"]) for row in without).most_common()),
        "unknown_words": fmean(row["oov_share"] for row in rows) if rows else None,
    }


def _kind(reason: str) -> str:
    """Return a reason without the figures of its one answer, so that equal ones are counted together."""
    kind = _SHARE.sub(r"fewer than \2 of \1 have a vector", reason)
    return kind.partition(":")[0] or "no reason given"


def language_name(code: str) -> str:
    """Return a language's English name, or its code."""
    return NAMES.get(code, code or "not stated")


def language_sentences(found: Iterable[Mapping[str, Any]], vectors: str | None) -> list[str]:
    """Return one sentence for each language that similarity partly leaves out.

    Args:
        vectors: the word vectors' name.
    """
    return [
        f"{entry['without_cosine']} of {entry['answers']} {language_name(entry['language'])} answers have no cosine"
        f"{f' from the vectors {vectors}' if vectors else ''} ({next(iter(entry['reasons']))}): similarity says nothing about them."
        for entry in found
        if entry["answers"] and entry["without_cosine"] >= WORTH_SAYING * entry["answers"]
    ]


def encoder_sentences(found: Iterable[Mapping[str, Any]], encoder: str | None) -> list[str]:
    """Return one sentence where the coverage judge spoke of a language that its encoder was not trained on.

    Args:
        encoder: its name, None where the coverage judge said nothing.
    """
    foreign = [f"{entry['questions']} {language_name(entry['language'])}" for entry in found if entry["language"] != "en"]
    if encoder not in ENGLISH_ENCODERS or not foreign:
        return []
    return [
        f"The coverage judge's encoder {encoder} was trained on English: its word on the {' and '.join(foreign)} questions is less sure; "
        "read the languages apart."
    ]
