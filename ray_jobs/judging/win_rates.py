"""What a count of wins proves: win rate and preference score with intervals, and exact tests of two models."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, stats

from ray_jobs.core.records import Winner
from ray_jobs.judging.rates import clustered_rate

Floats = NDArray[np.float64]
LABELS: tuple[Winner, ...] = ("a", "b", "tie")
POINTS: dict[Winner, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}
_STEPS = 240
"""A score's parts in the exact test: no rounding with two orders and up to five repeats."""
_MOST_PRODUCTS = 100_000_000
"""Products from which a convolution goes by Fourier transform: thousands of questions with scores of many sizes."""


class WinRate(NamedTuple):
    """Wins of two sides. `rate` is a's share of the questions that somebody won; None where nobody did.

    `low` and `high` are its exact 95% interval, `p_value` the exact two-sided binomial test against one half: the interval
    excludes one half just where p is below 0.05. Both are right with two orders and repeats, as these have become one
    outcome a question before.
    """

    wins_a: int
    wins_b: int
    ties: int
    unscored: int
    rate: float | None
    low: float | None
    high: float | None
    p_value: float | None


class Preference(NamedTuple):
    """Mean score of side a over questions: a win 1, a tie 0.5, a loss 0, averaged over the orders and repeats of each.

    `low` and `high` are its 95% interval with questions as clusters, `p_value` the exact sign-flip test against 0.5.
    """

    score: float | None
    low: float | None
    high: float | None
    p_value: float | None
    num_questions: int


def win_rate(winners: Iterable[Winner | None]) -> WinRate:
    """Return the win rate of side a; ties and unscored questions are counted beside it.

    Args:
        winners: one outcome a question.

    Source: Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the binomial", for
        the interval. Wilson's is narrower, but at 60:40 it excludes one half where the test (p = 0.057) does not.
    """
    counts = {label: 0 for label in (*LABELS, None)}
    for winner in winners:
        counts[winner] += 1
    a, b = counts["a"], counts["b"]
    if a + b == 0:
        return WinRate(a, b, counts["tie"], counts[None], None, None, None, None)
    test = stats.binomtest(a, a + b)
    interval = test.proportion_ci(method="exact")
    return WinRate(a, b, counts["tie"], counts[None], a / (a + b), float(interval.low), float(interval.high), float(test.pvalue))


def question_scores(verdicts: Iterable[dict[str, Any]], judge: str, model_a: str, model_b: str) -> dict[str, float]:
    """Return {question_id: score of `model_a`}: the mean over its orders of the mean over their repeats.

    An order without a scored repeat would tilt the mean towards the side that the other order favours, so a question of
    which only one order is scored is left out (unless only one was asked).

    Args:
        verdicts: Verdict rows.
    """
    games: dict[str, dict[bool, list[float | None]]] = {}
    for row in verdicts:
        if (row["judge"], row["model_a"], row["model_b"]) == (judge, model_a, model_b):
            points = None if row["winner"] is None else POINTS[row["winner"]]
            games.setdefault(row["question_id"], {}).setdefault(row["swapped"], []).append(points)
    scores = {}
    for question_id, orders in games.items():
        scored = [[points for points in order if points is not None] for order in orders.values()]
        if all(scored):
            scores[question_id] = sum(sum(order) / len(order) for order in scored) / len(scored)
    return scores


def preference(scores: Sequence[float]) -> Preference:
    """Return the mean of question scores with its interval and exact test.

    Args:
        scores: one a question, in [0, 1].
    """
    rate = clustered_rate(scores, np.ones(len(scores)))
    p_value = sign_flip_test(2 * np.asarray(scores) - 1) if len(scores) else None
    return Preference(rate.value, rate.low, rate.high, p_value, len(scores))


def sign_flip_test(differences: ArrayLike) -> float:
    """Return the exact two-sided p-value that paired differences in [-1, 1] have no side: all sign flips, none drawn.

    Differences are rounded to 1/240; the test of the rounded ones is exact too. Where all are -1, 0 or 1 it is the
    sign test. Thousands of questions with scores of many sizes go by Fourier transform, exact to about 1e-14.

    Source: Fisher 1935, "The design of experiments", section 21. Equal magnitudes are summed as one binomial.
    """
    steps = np.rint(np.asarray(differences, dtype=np.float64) * _STEPS).astype(np.int64)
    steps = steps[steps != 0] // max(1, int(np.gcd.reduce(steps)))
    if not len(steps):
        return 1.0
    parts = []
    for size, count in zip(*np.unique(np.abs(steps), return_counts=True), strict=True):
        # `count` signs of this size sum to size * (2 * heads - count): every 2 * size-th place
        spread = np.zeros(2 * size * count + 1)
        spread[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        parts.append(spread)
    while len(parts) > 1:  # the shortest two first: that is least work
        parts.sort(key=len, reverse=True)
        parts.append(_convolved(parts.pop(), parts.pop()))
    [chances] = parts
    sums = np.arange(len(chances)) - (len(chances) - 1) // 2
    return min(1.0, math.fsum(chances[np.abs(sums) >= abs(int(steps.sum()))]))


def _convolved(first: Floats, second: Floats) -> Floats:
    """Return the distribution of a sum from those of its two parts."""
    if len(first) * len(second) <= _MOST_PRODUCTS:
        return np.convolve(first, second)
    size = len(first) + len(second) - 1
    padded = fft.next_fast_len(size, real=True)
    found: Floats = fft.irfft(fft.rfft(first, padded) * fft.rfft(second, padded), padded)[:size]
    return np.maximum(found, 0.0)
