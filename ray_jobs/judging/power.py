"""How many questions a result needs."""

import math

from scipy import stats


def questions_needed(rate: float, *, power: float = 0.8, alpha: float = 0.05, decided_share: float = 1.0) -> int | None:
    """Return how many questions a two-sided test needs to tell this win rate from one half; None at one half.

    Args:
        rate: win rate among the decided questions.
        power: chance to see it.
        alpha: level of the test.
        decided_share: share of the questions that somebody wins; below 1 more have to be asked. 1 counts decided ones.

    Source: Fleiss, Levin and Paik 2003, "Statistical methods for rates and proportions", section 2.4, with the correction for
        continuity: the exact test needs more questions than a normal approximation says, and never fewer than six.
    """
    if rate == 0.5 or decided_share <= 0:
        return None
    z_alpha, z_power = stats.norm.ppf([1 - alpha / 2, power])
    distance = abs(rate - 0.5)
    uncorrected = ((z_alpha * 0.5 + z_power * math.sqrt(rate * (1 - rate))) / distance) ** 2
    decided = uncorrected / 4 * (1 + math.sqrt(1 + 2 / (uncorrected * distance))) ** 2
    return math.ceil(decided / decided_share)
