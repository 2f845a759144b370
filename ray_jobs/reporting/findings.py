"""From comparisons to what they show: wins with intervals, and how far judge and similarity agree."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from ray_jobs.core.records import Comparison, Winner
from ray_jobs.judging.agreement import agreement
from ray_jobs.judging.power import questions_needed
from ray_jobs.judging.results import SIMILARITY
from ray_jobs.judging.win_rates import win_rate
from ray_jobs.reporting.comparisons import Side
from ray_jobs.reporting.sentences import measure

Finding = dict[str, Any]
DECIDED: tuple[Winner, ...] = ("a", "b")
_WINNER: dict[Side, Winner | None] = {"1": "a", "2": "b", "tie": "tie", "unscored": None}
_SECOND_IS_A: dict[Side, Winner | None] = {**_WINNER, "2": "a", "1": "b"}
SCORED: tuple[Side, ...] = ("1", "2", "tie")


def matches(comparisons: Iterable[Comparison]) -> list[Finding]:
    """Return, for each pair of models, one row a judge and one for similarity: wins, win rate, interval, exact test.

    The win rate is the second model's share of the questions that somebody won.
    """
    found = []
    for pair, rows in _grouped(comparisons, lambda row: (row.model_1, row.model_2)):
        by_judge = _grouped(rows, lambda row: row.judge)
        found += [match_of(pair, judge, measure(judge), [row.llm_winner for row in judged]) for judge, judged in by_judge if judge]
        once = by_judge[0][1]
        if any(row.cos_winner != "unscored" for row in once):
            found.append(match_of(pair, None, SIMILARITY, [row.cos_winner for row in once], metric=SIMILARITY))
    return found


def agreements(comparisons: Iterable[Comparison], *, seed: int) -> list[Finding]:
    """Return, for each pair of models and each judge, the table of judge against similarity and Cohen's kappa.

    A question that either could not score is left out and counted in `left_out`. `decided` is the same without ties.

    Args:
        seed: of the bootstrap intervals.
    """
    groups = _grouped(comparisons, lambda row: (row.model_1, row.model_2, row.judge))
    return [_agreement(model_1, model_2, judge, rows, seed) for (model_1, model_2, judge), rows in groups if judge]


def match_of(pair: tuple[str, str], judge: str | None, title: str, winners: list[Side], *, metric: str | None = None) -> Finding:
    """Return one row of `matches`.

    `questions_needed` counts decided questions, `questions_asked` those to judge where as many are ties as here.

    Args:
        judge: its name, or None where `metric` says what sides with a model.
        title: either in words.
        winners: one a question.
    """
    result = win_rate(_SECOND_IS_A[winner] for winner in winners)
    num_scored = result.wins_a + result.wins_b + result.ties
    decided = (result.wins_a + result.wins_b) / num_scored if num_scored else 0.0
    return {
        "model_1": pair[0],
        "model_2": pair[1],
        "judge": judge,
        "metric": metric,
        "measure": title,
        "wins_1": result.wins_b,
        "wins_2": result.wins_a,
        "ties": result.ties,
        "unscored": result.unscored,
        "win_rate": result.rate,
        "low": result.low,
        "high": result.high,
        "p_value": result.p_value,
        "questions_needed": questions_needed(result.rate) if result.rate is not None else None,
        "questions_asked": questions_needed(result.rate, decided_share=decided) if result.rate is not None else None,
    }


def _agreement(model_1: str, model_2: str, judge: str, rows: list[Comparison], seed: int) -> Finding:
    by_judge = [_WINNER[row.llm_winner] for row in rows]
    by_similarity = [_WINNER[row.cos_winner] for row in rows]
    full = agreement(by_judge, by_similarity, seed=seed)
    decided = agreement(by_judge, by_similarity, labels=DECIDED, seed=seed)
    return {
        "model_1": model_1,
        "model_2": model_2,
        "judge": judge,
        "num_questions": full.num,
        "left_out": len(rows) - full.num,
        "table": {row: dict(zip(SCORED, counts, strict=True)) for row, counts in zip(SCORED, full.table, strict=True)},
        "agreed": sum(full.table[i][i] for i in range(len(SCORED))),
        "contradictions": decided.table[0][1] + decided.table[1][0],
        "kappa": full.kappa,
        "low": full.low,
        "high": full.high,
        "decided": {
            "num_questions": decided.num,
            "agreed": decided.table[0][0] + decided.table[1][1],
            "kappa": decided.kappa,
            "low": decided.low,
            "high": decided.high,
        },
    }


def _grouped(rows: Iterable[Comparison], key: Callable[[Comparison], Any]) -> list[tuple[Any, list[Comparison]]]:
    return [(value, list(group)) for value, group in groupby(rows, key)]
