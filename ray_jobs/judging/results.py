"""From verdicts and similarities to who won: one entry a pair of models, and the lines that say it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from ray_jobs.core.records import JURY, Winner
from ray_jobs.judging.agreement import Agreement, agreement, jury_agreement
from ray_jobs.judging.bradley_terry import Meeting, bradley_terry
from ray_jobs.judging.judge_card import judge_card
from ray_jobs.judging.judge_verdict import usability
from ray_jobs.judging.length_control import length_controlled
from ray_jobs.judging.pairs import PairResult, pair_results
from ray_jobs.judging.power import questions_needed
from ray_jobs.judging.similarity import FAILED, cos_winner
from ray_jobs.judging.win_rates import WinRate, preference, question_scores, win_rate

Row = dict[str, Any]
SIMILARITY = "similarity"
METRICS = (
    {SIMILARITY: "cosine"} | {name: name for name in ("sif_cosine", "soft_cosine", "token_f1", "content_f1")} | {"longer": "num_tokens"}
)
"""What sides with an answer without a judge, and its column in the Similarity rows; `longer` is the control."""


def metric_winners(similarities: Iterable[Row], model_a: str, model_b: str, *, column: str, tie_band: float) -> dict[str, Winner | None]:
    """Return {question_id: the model with the higher value}, None where either has none or no answer."""
    values: dict[str, dict[str, float | None]] = {model_a: {}, model_b: {}}
    for row in similarities:
        if row["model"] in values:
            is_answer = not row.get("reason", "").startswith(FAILED)
            values[row["model"]][row["question_id"]] = row.get(column) if is_answer else None
    return {id_: cos_winner(value, values[model_b].get(id_), tie_band=tie_band) for id_, value in values[model_a].items()}


def compare_models(
    pairs: Sequence[tuple[str, str]],
    judges: list[str],
    verdicts: list[Row],
    similarities: list[Row],
    *,
    tie_bands: Mapping[str, float],
    seed: int,
    members: Sequence[str] | None = None,
) -> list[Row]:
    """Return for each pair its win rates by every judge and metric, and how all of them agree.

    Args:
        judges: names as in the Verdict rows.
        members: those of the judges that make the jury, whose own agreement `jury` tells; None takes all but the jury.
        tie_bands: {column of the Similarity rows: largest difference that counts as a tie}; 0 where a column is absent.
        seed: of the bootstrap intervals.
    """
    results = {judge: pair_results(verdicts, judge) for judge in judges}
    entries = []
    for a, b in pairs:
        nearer = {
            name: metric_winners(similarities, a, b, column=column, tie_band=tie_bands.get(column, 0.0)) for name, column in METRICS.items()
        }
        of_pair = {judge: [result for result in found if (result.model_a, result.model_b) == (a, b)] for judge, found in results.items()}
        entries.append(
            {
                "model_a": a,
                "model_b": b,
                "win_rates": _win_rates(of_pair, nearer[SIMILARITY]),
                "preferences": {judge: _preference(verdicts, similarities, judge, a, b) for judge in judges},
                "agreement_with_similarity": {
                    judge: _agreement(_winners(found), nearer[SIMILARITY], seed)._asdict() for judge, found in of_pair.items()
                },
                "margins": {name: _margins(similarities, a, b, column, tie_bands.get(column, 0.0)) for name, column in METRICS.items()},
                **_agreements({judge: _winners(found) for judge, found in of_pair.items()}, nearer, members, seed),
            }
        )
    return entries


def rank_models(verdicts: Iterable[Row], judge: str, *, seed: int) -> list[Row]:
    """Return the models on one scale by one judge, the strongest first; [] below three models, where a win rate says it all."""
    verdicts = list(verdicts)
    pairs = dict.fromkeys((row["model_a"], row["model_b"]) for row in verdicts if row["judge"] == judge)
    if len({model for pair in pairs for model in pair}) < 3:
        return []
    meetings = [Meeting(id_, a, b, score) for a, b in pairs for id_, score in question_scores(verdicts, judge, a, b).items()]
    return [entry._asdict() for entry in bradley_terry(meetings, seed=seed)]


def describe_judge(
    verdicts: Iterable[Row],
    judge: str,
    similarities: Iterable[Row],
    *,
    seed: int,
    human: str | None = None,
    canaries_followed: Sequence[bool] = (),
) -> Row:
    """Return a judge's card as JSON values, with a plain word on whether it can be used.

    Args:
        human: as in `judge_card`.
        canaries_followed: as in `judge_card`.
    """
    lengths = {row["answer_id"]: row["num_tokens"] for row in similarities}
    card = judge_card(verdicts, judge, lengths=lengths, human=human, canaries_followed=canaries_followed, seed=seed)
    figures = {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in card._asdict().items()}
    return {**figures, "usability": usability(card)._asdict()}


def _margins(similarities: Iterable[Row], a: str, b: str, column: str, tie_band: float) -> Row:
    """How far apart the two models' values are: a winner that the third decimal decides is told by its margin."""
    values = {(row["model"], row["question_id"]): row.get(column) for row in similarities}
    pairs = [(value, values.get((b, id_))) for (model, id_), value in values.items() if model == a]
    margins = [abs(x - y) for x, y in pairs if x is not None and y is not None]
    return {"median": statistics.median(margins) if margins else None, "tie_band": tie_band, "ties": sum(m <= tie_band for m in margins)}


def _win_rates(of_pair: Mapping[str, list[PairResult]], nearer: Mapping[str, Winner | None]) -> Row:
    rates = {
        judge: {**_rate(win_rate(result.winner for result in found)), "inconsistent": sum(not result.consistent for result in found)}
        for judge, found in of_pair.items()
    }
    return {**rates, SIMILARITY: _rate(win_rate(nearer.values()))}


def _rate(rate: WinRate) -> Row:
    return {**rate._asdict(), "questions_needed": None if rate.rate is None else questions_needed(rate.rate)}


def _preference(verdicts: list[Row], similarities: list[Row], judge: str, a: str, b: str) -> Row:
    scores = question_scores(verdicts, judge, a, b)
    lengths = {(row["model"], row["question_id"]): row["num_tokens"] for row in similarities}
    known = [id_ for id_ in scores if (a, id_) in lengths and (b, id_) in lengths]
    controlled = length_controlled([scores[i] for i in known], [lengths[a, i] for i in known], [lengths[b, i] for i in known])
    return {**preference(list(scores.values()))._asdict(), "length_controlled": controlled._asdict()}


def _winners(results: Iterable[PairResult]) -> dict[str, Winner | None]:
    return {result.question_id: result.winner for result in results}


def _agreement(first: Mapping[str, Winner | None], second: Mapping[str, Winner | None], seed: int, **options: Any) -> Agreement:
    return agreement(list(first.values()), [second.get(id_) for id_ in first], seed=seed, **options)


def _agreements(
    judged: Mapping[str, Mapping[str, Winner | None]],
    nearer: Mapping[str, Mapping[str, Winner | None]],
    members: Sequence[str] | None,
    seed: int,
) -> Row:
    """Every judge beside every metric and every other judge but its own jury; `decided` leaves ties out (the 2x2)."""
    others = [(x, y) for x, y in combinations(judged, 2) if not (JURY in (x, y) and {x, y} & set(members or ()))]
    asked = [judge for judge in judged if judge != JURY] if members is None else members
    sides = [*((judge, metric) for judge in judged for metric in nearer), *others]
    everyone = {**nearer, **judged}
    found = [
        {
            "first": first,
            "second": second,
            **_agreement(everyone[first], everyone[second], seed)._asdict(),
            "decided": _agreement(everyone[first], everyone[second], seed, labels=("a", "b"))._asdict(),
        }
        for first, second in sides
    ]
    ids = list(dict.fromkeys(id_ for winners in judged.values() for id_ in winners))
    jury = jury_agreement([[judged[judge].get(id_) for id_ in ids] for judge in asked], seed=seed)
    return {"agreements": found, "jury": jury._asdict() if len(asked) > 1 else None}


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
