"""Several language models as one judge: what more than half of them say, question by question."""

from collections.abc import Iterable, Sequence
from typing import Any

from ray_jobs.core.records import JURY, Verdict, content_id
from ray_jobs.judging.agreement import majority
from ray_jobs.judging.pairs import PairResult, pair_results

Row = dict[str, Any]
_IN_WORDS = {"a": "answer 1", "b": "answer 2", "tie": "a tie"}


def jury_rows(verdicts: Iterable[Row], members: Sequence[str]) -> list[Row]:
    """Return one Verdict row a question and pair: what more than half of the judges who scored it say, else a tie.

    The members have played both orders, so a jury's row has none of its own; their costs are in their own rows.

    Args:
        verdicts: Verdict rows of the members.
        members: their names in the rows; fewer than two are no jury.
    """
    if len(members) < 2:
        return []
    verdicts = list(verdicts)
    found: dict[tuple[str, str, str], dict[str, PairResult]] = {}
    for member in members:
        for result in pair_results(verdicts, member):
            found.setdefault((result.question_id, result.model_a, result.model_b), {})[member] = result
    answers = {(row["question_id"], row["model_a"], row["model_b"]): (row["answer_a"], row["answer_b"]) for row in verdicts}
    sha = content_id(JURY, sorted({(row["judge"], row["rubric_sha"]) for row in verdicts if row["judge"] in members}))
    return [_row(key, answers[key], results, sha) for key, results in found.items()]


def _row(key: tuple[str, str, str], answers: tuple[str, str], results: dict[str, PairResult], sha: str) -> Row:
    winner = majority(result.winner for result in results.values())
    told = "\n".join(f"{member}: {_said(result)}" for member, result in results.items())
    return Verdict(
        verdict_id=content_id(*key, *answers, sha),
        question_id=key[0],
        answer_a=answers[0],
        answer_b=answers[1],
        model_a=key[1],
        model_b=key[2],
        judge=JURY,
        rubric_sha=sha,
        winner=winner,
        unscored="" if winner else f"no member of the jury scored it; {told}",
        explanation=told if winner else "",
    ).model_dump()


def _said(result: PairResult) -> str:
    return f"{_IN_WORDS[result.winner]}. {result.explanation}" if result.winner else f"no verdict ({result.unscored})"
