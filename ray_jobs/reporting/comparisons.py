"""One row for each question, pair of models and judge: both answers, both scores, who won by judge and by similarity."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal

from ray_jobs.core.records import Comparison, Verdict, Winner
from ray_jobs.judging.pairs import PairResult, pair_results
from ray_jobs.judging.similarity import cos_winner
from ray_jobs.reporting.run_files import MODELS, RunFiles
from ray_jobs.reporting.spreadsheet_csv import write_csv

Side = Literal["1", "2", "tie", "unscored"]
SIDES: tuple[Side, ...] = ("1", "2", "tie", "unscored")
FIRST_COLUMNS = (
    "question",
    "sample_answer",
    "answer_1",
    "answer_2",
    "llm_winner",
    "similarity_1",
    "similarity_2",
    "cos_winner",
    "explanation",
)
SIDE_OF: dict[Winner | None, Side] = {"a": "1", "b": "2", "tie": "tie", None: "unscored"}


def judges_of(run: RunFiles) -> list[str]:
    """Return the judges that spoke, in the order of their verdicts."""
    return list(dict.fromkeys(row["judge"] for row in run.verdicts))


def pairs_of(run: RunFiles) -> list[tuple[str, str]]:
    """Return the pairs of models that met; before they were judged, the neighbours of base, teacher and student that answered."""
    judged = dict.fromkeys((row["model_a"], row["model_b"]) for row in run.verdicts)
    return list(judged) or list(pairwise(model for model in MODELS if model in run.answers))


def results_of(run: RunFiles) -> dict[tuple[str, str, str, str], PairResult]:
    """Return {(judge, model_1, model_2, question_id): what the judge says over both orders}."""
    return {
        (judge, result.model_a, result.model_b, result.question_id): result
        for judge in judges_of(run)
        for result in pair_results(run.verdicts, judge)
    }


def compare(run: RunFiles, *, tie_band: float) -> list[Comparison]:
    """Return the comparisons, by pair, then judge, then question in the order asked.

    Where nobody has judged, or a question has no verdict, the winner is "unscored".

    Args:
        tie_band: largest difference of two cosines that counts as a tie.
    """
    results = results_of(run)
    cosines = {(row["model"], row["question_id"]): row["cosine"] for row in run.similarities}
    return [
        _comparison(run, question, pair, judge, results.get((judge, *pair, question["question_id"])), cosines, tie_band)
        for pair in pairs_of(run)
        for judge in judges_of(run) or [""]
        for question in run.questions
    ]


def _comparison(
    run: RunFiles,
    question: dict[str, Any],
    pair: tuple[str, str],
    judge: str,
    result: PairResult | None,
    cosines: dict[tuple[str, str], float | None],
    tie_band: float,
) -> Comparison:
    question_id = question["question_id"]
    texts = [run.answers.get(model, {}).get(question_id, {}).get("text", "") for model in pair]
    similarities = [cosines.get((model, question_id)) for model in pair]
    return Comparison(
        question_id=question_id,
        topic=question["topic"],
        language=question["language"],
        model_1=pair[0],
        model_2=pair[1],
        judge=judge,
        question=question["question"],
        sample_answer=question["reference"],
        answer_1=texts[0],
        answer_2=texts[1],
        llm_winner=SIDE_OF[result.winner if result else None],
        similarity_1=similarities[0],
        similarity_2=similarities[1],
        cos_winner=SIDE_OF[cos_winner(*similarities, tie_band=tie_band)],
        explanation=(result.explanation or result.unscored) if result else "",
    )


def to_csv(rows: Iterable[Comparison]) -> bytes:
    """Return the comparisons as CSV."""
    columns = [*FIRST_COLUMNS, *(name for name in Comparison.model_fields if name not in FIRST_COLUMNS)]
    return write_csv(columns, (row.model_dump() for row in rows))


def verdicts_to_csv(verdicts: Iterable[dict[str, Any]]) -> bytes:
    """Return every verdict of every judge, order and repeat as CSV, but for the raw replies, which stay in verdicts.parquet."""
    return write_csv([name for name in Verdict.model_fields if name != "raw"], verdicts)
