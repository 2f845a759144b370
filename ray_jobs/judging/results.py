"""From verdicts and similarities to who won: one entry a pair and judge, and the lines that say it."""

from collections.abc import Sequence
from typing import Any

from ray_jobs.core.records import Winner
from ray_jobs.judging.pairs import PairResult, pair_results
from ray_jobs.judging.similarity import cos_winner
from ray_jobs.judging.statistics import Agreement, WinRate, agreement, questions_needed, win_rate

Row = dict[str, Any]
SIMILARITY = "similarity"


def cos_winners(similarities: list[Row], model_a: str, model_b: str, *, tie_band: float) -> dict[str, Winner | None]:
    """Return {question_id: who is nearer to the sample answer by mean-pooled cosine}."""
    cosines: dict[str, dict[str, float | None]] = {model_a: {}, model_b: {}}
    for row in similarities:
        if row["model"] in cosines:
            cosines[row["model"]][row["question_id"]] = row["cosine"]
    return {id_: cos_winner(cosine, cosines[model_b].get(id_), tie_band=tie_band) for id_, cosine in cosines[model_a].items()}


def compare_models(
    pairs: Sequence[tuple[str, str]],
    judges: list[str],
    verdicts: list[Row],
    similarities: list[Row],
    *,
    tie_band: float,
    seed: int,
) -> list[Row]:
    """Return for each pair its win rates by every judge and by similarity, and each judge's agreement with similarity.

    Args:
        judges: names as in the Verdict rows.
        tie_band: largest difference of two cosines that counts as a tie.
        seed: of the bootstrap intervals.
    """
    results = {judge: pair_results(verdicts, judge) for judge in judges}
    return [_compare(a, b, results, cos_winners(similarities, a, b, tie_band=tie_band), seed=seed) for a, b in pairs]


def _compare(a: str, b: str, results: dict[str, list[PairResult]], nearer: dict[str, Winner | None], *, seed: int) -> Row:
    entry: Row = {"model_a": a, "model_b": b, "win_rates": {}, "agreement_with_similarity": {}}
    for judge, found in results.items():
        of_pair = [result for result in found if (result.model_a, result.model_b) == (a, b)]
        entry["win_rates"][judge] = {
            **_rate(win_rate(result.winner for result in of_pair)),
            "inconsistent": sum(not result.consistent for result in of_pair),
        }
        winners = [result.winner for result in of_pair]
        agreed = agreement(winners, [nearer.get(result.question_id) for result in of_pair], seed=seed)
        entry["agreement_with_similarity"][judge] = agreed._asdict()
    entry["win_rates"][SIMILARITY] = _rate(win_rate(nearer.values()))
    return entry


def _rate(rate: WinRate) -> Row:
    return {**rate._asdict(), "questions_needed": None if rate.rate is None else questions_needed(rate.rate)}


def pair_headline(entry: Row) -> str:
    """Return one line on a pair: wins a:b by every judge and by similarity, and their agreement."""
    parts = [f"{judge} {_score(rate)}" for judge, rate in entry["win_rates"].items()]
    parts += [
        f"agreement of {judge} and similarity: kappa {_kappa(Agreement(**agreed))}"
        for judge, agreed in entry["agreement_with_similarity"].items()
    ]
    return f"{entry['model_a']} vs {entry['model_b']}: {'; '.join(parts)}"


def _score(rate: Row) -> str:
    beside = [f"{rate['ties']} ties" if rate["ties"] != 1 else "1 tie"] if rate["ties"] else []
    beside += [f"{rate['unscored']} unscored"] if rate["unscored"] else []
    beside += [f"p = {rate['p_value']:.2g}"] if rate["p_value"] is not None else []
    return f"{rate['wins_a']}:{rate['wins_b']}" + (f" ({', '.join(beside)})" if beside else "")


def _kappa(agreed: Agreement) -> str:
    if agreed.kappa is None or agreed.low is None or agreed.high is None:
        return "undefined"
    return f"{agreed.kappa:.2f} [{agreed.low:.2f}, {agreed.high:.2f}]"
