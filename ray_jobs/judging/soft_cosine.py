"""Cosine of two bags of words in which near words count as partly equal.

Shape letters: K distinct known words of a text, D width of the vectors.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_jobs.judging.pooling import unit

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

Floats = NDArray[np.float64]


class Bag(NamedTuple):
    """A text's distinct known words as unit vectors, how often each occurs, and the bag's own length."""

    words_KD: Floats
    counts_K: Floats
    length: float


def make_bag(tokens: list[str], vectors: "KeyedVectors") -> Bag:
    """Return the bag of a text's known words; its length is 0 where none is known."""
    known = [vectors.key_to_index[word] for word in tokens if word in vectors.key_to_index]
    ids_K, counts_K = np.unique(np.array(known, dtype=np.int64), return_counts=True)
    words_KD = np.nan_to_num(unit(np.asarray(vectors.vectors[ids_K], dtype=np.float64)))
    bag = Bag(words_KD, counts_K.astype(np.float64), 0.0)
    return bag._replace(length=float(np.sqrt(_product(bag, bag))))


def soft_cosine(first: Bag, second: Bag) -> float | None:
    """Return the soft cosine; None where either text has no known word.

    The similarity of two words is the square of their cosine, 0 where that is negative: gensim's
    `WordEmbeddingSimilarityIndex` with its defaults, without its limit of neighbours a word.

    Source: Sidorov et al. 2014; Charlet and Damnati 2017 (SimBow) for the exponent.
    """
    if not (first.length and second.length):
        return None
    return _product(first, second) / (first.length * second.length)


def _product(first: Bag, second: Bag) -> float:
    near = np.maximum(first.words_KD @ second.words_KD.T, 0.0) ** 2
    return float(first.counts_K @ near @ second.counts_K)
