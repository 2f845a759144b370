"""How many questions a result needs, and what a number of questions can show."""

import math

from scipy import stats


def questions_needed(rate: float, *, power: float = 0.8, alpha: float = 0.05, decided_share: float = 1.0) -> int | None:
    """Return how many questions a two-sided test needs to tell this win rate from one half; None at one half.

    Args:
        rate: win rate among the decided questions.
        power: chance to see it.
        alpha: level of the test.
        decided_share: share of the questions that somebody wins; below 1 more have to be asked. 1 counts decided ones.

    Source: normal approximation of the binomial test, Fleiss, Levin and Paik 2003, section 2.4.
    """
    if rate == 0.5 or decided_share <= 0:
        return None
    z_alpha, z_power = stats.norm.ppf([1 - alpha / 2, power])
    decided = ((z_alpha * 0.5 + z_power * math.sqrt(rate * (1 - rate))) / (rate - 0.5)) ** 2
    return math.ceil(decided / decided_share)


def smallest_visible_rate(num_decided: int, *, power: float = 0.8) -> float | None:
    """Return the smallest win rate above one half that this many decided questions show with this power; None below 6.

    Six is the smallest number with which the exact test can reach 5% at all.
    """
    if num_decided < 6:
        return None
    low, high = 0.5, 1.0
    while high - low > 1e-4:
        rate = (low + high) / 2
        low, high = (rate, high) if exact_power(num_decided, rate) < power else (low, rate)
    return high


def exact_power(num_decided: int, rate: float, *, alpha: float = 0.05) -> float:
    """Return the chance that the exact two-sided binomial test of `num_decided` questions shows this win rate."""
    critical = int(stats.binom.isf(alpha / 2, num_decided, 0.5)) + 1  # wins from here on are significant
    upper = stats.binom.sf(critical - 1, num_decided, rate)
    return float(upper + stats.binom.cdf(num_decided - critical, num_decided, rate))
