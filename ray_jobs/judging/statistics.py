"""What a count of wins proves: interval, exact test, agreement of two judges, questions needed."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ray_jobs.core.records import Winner

LABELS: tuple[Winner, ...] = ("a", "b", "tie")


class WinRate(NamedTuple):
    """Wins of two sides. `rate` is a's share of the games that somebody won; None where nobody did.

    `low` and `high` are its 95% Wilson interval, `p_value` the exact two-sided binomial test against one half.
    """

    wins_a: int
    wins_b: int
    ties: int
    unscored: int
    rate: float | None
    low: float | None
    high: float | None
    p_value: float | None


class Agreement(NamedTuple):
    """How two judges of the same questions agree, beyond chance.

    `table[i][j]` counts questions that the first judge gave to `labels[i]` and the second to `labels[j]`.
    `kappa` is Cohen's, with a 95% bootstrap interval over questions; None where chance alone explains all.
    """

    labels: tuple[Winner, ...]
    table: list[list[int]]
    num: int
    share: float | None
    kappa: float | None
    low: float | None
    high: float | None


def win_rate(winners: Iterable[Winner | None]) -> WinRate:
    """Return the win rate of side a; ties and unscored games are counted beside it.

    Source: Wilson 1927 for the interval.
    """
    counts = {label: 0 for label in (*LABELS, None)}
    for winner in winners:
        counts[winner] += 1
    a, b = counts["a"], counts["b"]
    if a + b == 0:
        return WinRate(a, b, counts["tie"], counts[None], None, None, None, None)
    test = stats.binomtest(a, a + b)
    interval = test.proportion_ci(method="wilson")
    return WinRate(a, b, counts["tie"], counts[None], a / (a + b), float(interval.low), float(interval.high), float(test.pvalue))


def agreement(
    first: Iterable[Winner | None],
    second: Iterable[Winner | None],
    *,
    labels: tuple[Winner, ...] = LABELS,
    seed: int = 0,
    samples: int = 2000,
) -> Agreement:
    """Return the agreement of two judges on the same questions, in the same order.

    Args:
        first: verdicts of one judge, one a question.
        second: verdicts of the other.
        labels: verdicts that count; a question where either judge says another one (or None) is left out.
            ("a", "b") gives the 2x2 table without ties.
        seed: of the bootstrap.
        samples: of the bootstrap.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    place = {label: i for i, label in enumerate(labels)}
    both = [(place[x], place[y]) for x, y in zip(first, second, strict=True) if x in place and y in place]
    size = len(labels)
    table = np.zeros((size, size), dtype=np.int64)
    for i, j in both:
        table[i, j] += 1
    if not both:
        return Agreement(labels, table.tolist(), 0, None, None, None, None)
    # drawing questions with replacement is drawing the cells of the table
    draws = np.random.default_rng(seed).multinomial(len(both), table.ravel() / len(both), size=samples)
    kappas = _kappa(draws.reshape(samples, size, size))
    kappas = kappas[~np.isnan(kappas)]
    low, high = np.percentile(kappas, [2.5, 97.5]) if kappas.size else (math.nan, math.nan)
    kappa = _number(_kappa(table[None])[0])
    bounds = (None, None) if kappa is None else (_number(low), _number(high))
    return Agreement(labels, table.tolist(), len(both), float(np.trace(table) / len(both)), kappa, *bounds)


def questions_needed(rate: float, *, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Return how many decided questions a two-sided test needs to tell this win rate from one half; None at one half.

    Source: normal approximation of the binomial test, Fleiss, Levin and Paik 2003, section 2.4.
    """
    if rate == 0.5:
        return None
    z_alpha, z_power = stats.norm.ppf([1 - alpha / 2, power])
    return math.ceil(((z_alpha * 0.5 + z_power * math.sqrt(rate * (1 - rate))) / (rate - 0.5)) ** 2)


def _kappa(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    total = tables.sum(axis=(1, 2))
    observed = np.trace(tables, axis1=1, axis2=2) / total
    expected = (tables.sum(axis=2) * tables.sum(axis=1)).sum(axis=1) / total**2
    return np.divide(observed - expected, 1 - expected, out=np.full(len(tables), np.nan), where=expected < 1)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
