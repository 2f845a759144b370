"""What a judge's own verdicts tell about the judge: order, repeats, length, canaries, people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from ray_jobs.core.records import Winner
from ray_jobs.judging.agreement import Agreement, agreement
from ray_jobs.judging.pairs import NOT_ASKED, PairResult, pair_results
from ray_jobs.judging.rates import Rate, clustered_rate
from ray_jobs.judging.win_rates import LABELS

Row = dict[str, Any]
Side = tuple[str, str, str]
MIN_LONGER = 5
"""Questions on which each of two models must have written more, before a preference for length can be told from one for a model."""
Said = dict[bool, list[Winner | None]]
"""One judge on one question and pair: {swapped: its verdicts by repeat}; winners name sides, not positions."""


class JudgeCard(NamedTuple):
    """A judge, measured on the run's own questions; each rate has questions as clusters. Games it was never asked are left out.

    `position_consistency` is the share of games that name the same winner in the other order, and `order_kappa` the same
    beyond chance. `repeat_stability` is the share of equal verdicts when the same order is asked again: only what is
    below it in consistency is the order's doing. `first_position_rate` counts decided games in which the answer read
    first won, over questions scored in both orders, where each answer is first once. `longer_rate` counts decided
    questions that the longer answer won; a better model may simply write more, so `length_preference` weighs the questions
    on which one model wrote more like those on which the other did, and is one half for a judge who minds only the models.
    `canaries_followed` of `canaries` planted instructions were obeyed. `human` is its agreement with people beyond chance,
    `human_share` the share of the labelled questions on which both say the same.
    """

    judge: str
    num_questions: int
    num_games: int
    unscored_share: float | None
    tie_rate: Rate
    position_consistency: Rate
    order_kappa: Agreement
    repeat_stability: Rate
    first_position_rate: Rate
    longer_rate: Rate
    length_preference: Rate
    canaries: int
    canaries_followed: int
    human: Agreement
    human_share: Rate


def judge_card(
    verdicts: Iterable[Row],
    judge: str,
    *,
    lengths: Mapping[str, int],
    human: str | None = None,
    canaries_followed: Sequence[bool] = (),
    seed: int = 0,
) -> JudgeCard:
    """Return the card of one judge.

    Args:
        verdicts: Verdict rows of this judge, and of `human`.
        judge: its name in the rows.
        lengths: {answer_id: length} in any one unit.
        human: the name in the rows of people's verdicts, where there are any.
        canaries_followed: for each canary game, whether the judge did what the planted text asked.
        seed: of the bootstrap intervals.
    """
    verdicts = list(verdicts)
    rows = [row for row in verdicts if row["judge"] == judge and not row["unscored"].startswith(NOT_ASKED)]
    games = _games(rows)
    results = pair_results(rows, judge)
    longer = list(_longer_wins(rows, results, lengths))
    labels = {} if human is None else {_key(result): result.winner for result in pair_results(verdicts, human)}
    beside = [(result.question_id, result.winner, labels.get(_key(result))) for result in results]
    return JudgeCard(
        judge=judge,
        num_questions=len({row["question_id"] for row in rows}),
        num_games=len(rows),
        unscored_share=sum(row["winner"] is None for row in rows) / len(rows) if rows else None,
        tie_rate=_by_question((row["question_id"], row["winner"] == "tie", 1) for row in rows if row["winner"] is not None),
        position_consistency=_by_question((id_, x == y, True) for id_, x, y in _across_orders(games)),
        order_kappa=_order_kappa(games, seed),
        repeat_stability=_by_question((id_, x == y, True) for id_, x, y in _across_repeats(games)),
        first_position_rate=_by_question(_first_wins(games)),
        longer_rate=_by_question((id_, won, 1.0) for id_, won, _ in longer),
        length_preference=_by_question(_balanced(longer)),
        canaries=len(canaries_followed),
        canaries_followed=sum(canaries_followed),
        human=agreement(
            [said for _, said, _ in beside], [label for _, _, label in beside], questions=[id_ for id_, _, _ in beside], seed=seed
        ),
        human_share=_by_question((id_, said == label, 1) for id_, said, label in beside if said is not None and label is not None),
    )


def _games(rows: Iterable[Row]) -> dict[tuple[str, str, str], Said]:
    games: dict[tuple[str, str, str], Said] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):
        games.setdefault((row["question_id"], row["model_a"], row["model_b"]), {}).setdefault(row["swapped"], []).append(row["winner"])
    return games


def _key(result: PairResult) -> tuple[str, str, str]:
    return result.question_id, result.model_a, result.model_b


def _by_question(items: Iterable[tuple[str, float, float]]) -> Rate:
    """Return the rate over (question, counts as yes, counts at all), with the question as the unit."""
    won: dict[str, float] = {}
    played: dict[str, float] = {}
    for question_id, yes, counts in items:
        won[question_id] = won.get(question_id, 0.0) + yes
        played[question_id] = played.get(question_id, 0.0) + counts
    return clustered_rate(list(won.values()), list(played.values()))


def _across_orders(games: Mapping[tuple[str, str, str], Said]) -> list[tuple[str, Winner, Winner]]:
    """Every scored verdict in one order beside every one in the other: repeats take part in all combinations."""
    return [
        (id_, x, y)
        for (id_, _, _), said in games.items()
        for x in said.get(False, [])
        for y in said.get(True, [])
        if x is not None and y is not None
    ]


def _across_repeats(games: Mapping[tuple[str, str, str], Said]) -> list[tuple[str, Winner, Winner]]:
    return [
        (id_, x, y)
        for (id_, _, _), said in games.items()
        for order in said.values()
        for x, y in combinations(order, 2)
        if x is not None and y is not None
    ]


def _order_kappa(games: Mapping[tuple[str, str, str], Said], seed: int) -> Agreement:
    both = _across_orders(games)
    return agreement([x for _, x, _ in both], [y for _, _, y in both], labels=LABELS, questions=[id_ for id_, _, _ in both], seed=seed)


def _first_wins(games: Mapping[tuple[str, str, str], Said]) -> Iterable[tuple[str, bool, float]]:
    for (id_, _, _), said in games.items():
        if all(any(said.get(swapped, [])) for swapped in (False, True)):
            for swapped, order in said.items():
                for winner in order:
                    if winner in ("a", "b"):
                        yield id_, winner == ("b" if swapped else "a"), 1.0


def _longer_wins(rows: Iterable[Row], results: Iterable[PairResult], lengths: Mapping[str, int]) -> Iterable[tuple[str, bool, Side]]:
    """Yield (question, whether the longer answer won, (model_a, model_b, which of them wrote more)) of decided questions."""
    answers = {(row["question_id"], row["model_a"], row["model_b"]): (row["answer_a"], row["answer_b"]) for row in rows}
    for result in results:
        known = [lengths[id_] for id_ in answers[_key(result)] if id_ in lengths]
        if len(set(known)) == 2 and result.winner in ("a", "b"):
            longer = "a" if known[0] > known[1] else "b"
            yield result.question_id, result.winner == longer, (result.model_a, result.model_b, longer)


def _balanced(longer: Sequence[tuple[str, bool, Side]]) -> Iterable[tuple[str, float, float]]:
    """Yield (question, weight if the longer won, weight), the two sides of each pair of models weighing the same."""
    counts = Counter(side for _, _, side in longer)
    for question_id, won, (model_a, model_b, written_by) in longer:
        sides = [counts[model_a, model_b, side] for side in ("a", "b")]
        if min(sides) >= MIN_LONGER:
            weight = sum(sides) / counts[model_a, model_b, written_by]
            yield question_id, weight * won, weight
