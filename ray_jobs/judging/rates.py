"""A rate of games with an interval that counts questions, not games."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Rate(NamedTuple):
    """A rate in [0, 1] with its 95% interval; all None where no question counts."""

    value: float | None
    low: float | None
    high: float | None
    num_questions: int


def clustered_rate(won: ArrayLike, played: ArrayLike) -> Rate:
    """Return sum(won) / sum(played) over questions, with Wilson's interval at the effective number of questions.

    Both orders and all repeats of a question share its text and its answers, so they are not independent: ten repeats of
    20 questions are not 200 observations. The variance is therefore taken between questions (linearised for the ratio),
    turned into the number of independent yes/no observations that would vary as much, and that number enters Wilson's
    interval, which keeps inside [0, 1] and holds near 0 and 1 where a bootstrap's percentiles collapse. Where all
    questions are alike (variance 0) each counts as one observation.

    Args:
        won: for each question, games (or parts of one) that count as yes.
        played: for each question, games that count at all; questions with 0 are left out.

    Source: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data"; Dean and Pagano 2015 (for Wilson's form of it).
    """
    won_Q, played_Q = np.asarray(won, dtype=np.float64), np.asarray(played, dtype=np.float64)
    won_Q, played_Q = won_Q[played_Q > 0], played_Q[played_Q > 0]
    num = len(played_Q)
    if not num:
        return Rate(None, None, None, 0)
    rate = float(won_Q.sum() / played_Q.sum())
    residual_Q = (won_Q - rate * played_Q) / played_Q.mean()
    variance = float(residual_Q @ residual_Q) / (num * (num - 1)) if num > 1 else 0.0
    effective = rate * (1 - rate) / variance if variance > 1e-12 else float(num)
    quantile = float(stats.t.ppf(0.975, num - 1)) if num > 1 else float(stats.norm.ppf(0.975))
    return Rate(rate, *wilson(rate, effective, quantile), num)


def wilson(rate: float, num: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's interval of a rate seen in `num` observations.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    shrink = quantile**2 / num
    middle = (rate + shrink / 2) / (1 + shrink)
    half = quantile * np.sqrt(rate * (1 - rate) / num + shrink / (4 * num)) / (1 + shrink)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
