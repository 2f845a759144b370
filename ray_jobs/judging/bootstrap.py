"""Sums over questions drawn with replacement: the one resampling that every bootstrap interval here stands on.

Shape letters: Q questions, K numbers a question, S draws.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLES = 2000
_ENTRIES_AT_ONCE = 4_000_000


def resampled_sums(values_QK: ArrayLike, *, seed: int, samples: int = SAMPLES) -> NDArray[np.float64]:
    """Return (S, K): the column sums of each draw of Q questions out of Q.

    A question is drawn whole, so whatever was asked twice about it (both orders, repeats, several pairs of models)
    stays together. Equal questions are counted instead of listed, which makes 10,000 of them as quick as 100 and the
    result independent of their order.

    Source: Field and Welsh 2007, "Bootstrapping clustered data" (the cluster bootstrap).
    """
    values_QK = np.asarray(values_QK, dtype=np.float64)
    distinct, counts = np.unique(values_QK, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    share, at_once = counts / len(values_QK), max(1, _ENTRIES_AT_ONCE // len(distinct))
    parts = [
        generator.multinomial(len(values_QK), share, size=min(at_once, samples - start)) @ distinct for start in range(0, samples, at_once)
    ]
    return np.concatenate(parts)


def middle_95(values: NDArray[np.float64]) -> tuple[Any, Any]:
    """Return the 2.5th and 97.5th percentile along the first axis, nan left out; nan where nothing is left."""
    if not len(values) or np.isnan(values).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(values, [2.5, 97.5], axis=0)
    return low, high
