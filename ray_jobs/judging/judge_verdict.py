"""Can this judge be used? A word for its card, the reasons, and the thresholds they come from."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from ray_jobs.judging.judge_card import JudgeCard
from ray_jobs.judging.rates import Rate

Word = Literal["usable", "weak", "unusable"]


class Usability(NamedTuple):
    """`unusable`: its win rates say nothing about the answers. `weak`: they do, but a known fault could explain a close one."""

    word: Word
    reasons: list[str]


MOST_UNSCORED, MANY_UNSCORED = 0.20, 0.05
"""Share of games without a verdict: above one in twenty, what is missing could turn a close result; above one in five, any."""
ALWAYS_TIE, OFTEN_TIE = 0.95, 0.50
"""Share of ties from which a judge decides next to nothing, or less than half."""
CHANCE_KAPPA = 0.10
"""A judge whose kappa between its two orders is not shown to be above this is a coin, unless it is consistent all the
same (LOW_CONSISTENCY) because one model nearly always wins: kappa is blind there."""
MIN_QUESTIONS = 20
"""Fewer questions in both orders condemn no judge as a coin: of a good one, too, little is shown then."""
NEVER_DIFFERED = 5
"""Questions from which a judge that always says the same in both orders is no coin: one would in 1 of 32 runs."""
LOW_CONSISTENCY = 0.75
"""MT-bench (arXiv:2306.05685) has GPT-4 at 65% with a plain prompt and at 77.5% with examples."""
LOW_STABILITY = 0.80
ALWAYS_FIRST, OFTEN_FIRST = 0.75, 0.60
"""First-position rate, and as far below one half for a judge that prefers the second: one half is fair."""
ALWAYS_LONGER, OFTEN_LONGER = 0.90, 0.70
"""Length alone agrees with people in 62% of AlpacaEval: more than 0.7 is more than honest preference explains."""
WEAK_HUMAN_KAPPA = 0.40
"""Below this Landis and Koch 1977 call agreement fair at best. PandaLM's annotators reach 0.85 among themselves."""
SAME_AS_PEOPLE = 0.75
"""A judge that is shown to say what people say more often than this is not condemned for its kappa: where people nearly always
prefer one model, kappa is near 0 for a good judge too (Feinstein and Cicchetti 1990, "High agreement but low kappa")."""
MIN_HUMAN_LABELS = 30
"""Fewer labels condemn no judge: chance agreement is not excluded for a good one either."""


def usability(card: JudgeCard) -> Usability:
    """Return whether a judge can be used, with what speaks against it; the thresholds are this file's constants.

    A bound of the 95% interval, not the figure, has to cross a threshold where chance could carry the figure over it.
    """
    if not card.num_games:
        return Usability("unusable", ["it has judged nothing"])
    condemned = [reason for holds, reason in _condemn(card) if holds]
    if condemned:
        return Usability("unusable", condemned)
    doubts = [reason for holds, reason in _doubt(card) if holds]
    unknown = [] if card.human.num else ["not compared with people's verdicts: consistent is not yet right"]
    return Usability("weak" if doubts else "usable", doubts + unknown)


def jury_usability(own: Usability, members: Mapping[str, Word]) -> Usability:
    """Return whether a jury can be used: what its own card says, and no better than its members allow.

    Its members' votes are all it has: it has no order, no repeats and no canaries of its own that could show a fault.

    Args:
        own: of the jury's card.
        members: {judge: its word}.
    """
    unusable = [judge for judge, word in members.items() if word == "unusable"]
    doubtful = [judge for judge, word in members.items() if word != "usable"]
    if 2 * len(unusable) >= len(members):
        return Usability("unusable", [f"{_of(members, unusable)} unusable", *own.reasons])
    if own.word != "unusable" and (unusable or 2 * len(doubtful) > len(members)):
        return Usability("weak", [f"{_of(members, doubtful)} weak or unusable", *own.reasons])
    return own


def _of(members: Mapping[str, Word], some: list[str]) -> str:
    return f"{len(some)} of its {len(members)} members ({', '.join(some)}) {'is' if len(some) == 1 else 'are'}"


def _condemn(card: JudgeCard) -> list[tuple[bool, str]]:
    human = card.human
    return [
        (_above(card.unscored_share, MOST_UNSCORED), _unscored(card)),
        (_above(card.tie_rate.value, ALWAYS_TIE), _ties(card)),
        (_shown_above(card.first_position_rate, ALWAYS_FIRST), _first(card)),
        (_shown_below(card.first_position_rate, 1 - ALWAYS_FIRST), _first(card)),
        (_may_be_a_coin(card) and card.position_consistency.num_questions >= MIN_QUESTIONS, _coin(card)),
        (_shown_above(card.length_preference, ALWAYS_LONGER), f"{_longer(card)}: it measures length"),
        (2 * card.canaries_followed > card.canaries, _canaries(card)),
        (
            human.num >= MIN_HUMAN_LABELS
            and human.low is not None
            and human.low <= 0
            and not _shown_above(card.human_share, SAME_AS_PEOPLE),
            f"its agreement with people is not shown to be better than chance (kappa {_figure(human.kappa)} on {human.num} labels)",
        ),
    ]


def _doubt(card: JudgeCard) -> list[tuple[bool, str]]:
    consistency, stability, human = card.position_consistency, card.repeat_stability, card.human
    return [
        (_above(card.unscored_share, MANY_UNSCORED), _unscored(card)),
        (_shown_above(card.tie_rate, OFTEN_TIE), _ties(card)),
        (_may_be_a_coin(card), _coin(card)),
        (
            _below(consistency.value, LOW_CONSISTENCY),
            f"it names the same winner in both orders in {_percent(consistency.value)} of the games",
        ),
        (_shown_above(card.first_position_rate, OFTEN_FIRST), _first(card)),
        (_shown_below(card.first_position_rate, 1 - OFTEN_FIRST), _first(card)),
        (
            _below(stability.value, LOW_STABILITY),
            f"asked again in the same order it says the same in {_percent(stability.value)} of the games",
        ),
        (_shown_above(card.length_preference, OFTEN_LONGER), _longer(card)),
        (card.canaries_followed > 0, _canaries(card)),
        (
            _below(human.kappa, WEAK_HUMAN_KAPPA),
            f"it agrees with people at kappa {_figure(human.kappa)} on {human.num} labels ({_percent(card.human_share.value)} the same)",
        ),
    ]


def _may_be_a_coin(card: JudgeCard) -> bool:
    low, consistency = card.order_kappa.low, card.position_consistency
    never_differed = consistency.value == 1.0 and consistency.num_questions >= NEVER_DIFFERED
    return low is not None and low <= CHANCE_KAPPA and not (never_differed or _shown_above(consistency, LOW_CONSISTENCY))


def _coin(card: JudgeCard) -> str:
    orders, num = card.order_kappa, card.position_consistency.num_questions
    figures = f"kappa {_figure(orders.kappa)}, from {_figure(orders.low)}, on {num} question{'s' * (num != 1)}"
    return f"its verdicts in the two orders are not shown to agree better than chance ({figures})"


def _unscored(card: JudgeCard) -> str:
    return f"{_percent(card.unscored_share)} of its games have no verdict"


def _ties(card: JudgeCard) -> str:
    return f"it calls {_percent(card.tie_rate.value)} of the games a tie"


def _first(card: JudgeCard) -> str:
    return f"the answer read first wins {_percent(card.first_position_rate.value)} of its decided games"


def _longer(card: JudgeCard) -> str:
    return f"whichever model it is of, the longer answer wins {_percent(card.length_preference.value)} of its decided questions"


def _canaries(card: JudgeCard) -> str:
    return f"it obeyed {card.canaries_followed} of {card.canaries} planted instructions"


def _above(value: float | None, threshold: float) -> bool:
    return value is not None and value > threshold


def _below(value: float | None, threshold: float) -> bool:
    return value is not None and value < threshold


def _shown_above(rate: Rate, threshold: float) -> bool:
    return _above(rate.low, threshold)


def _shown_below(rate: Rate, threshold: float) -> bool:
    return _below(rate.high, threshold)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
