"""Texts as vectors: the mean of their words' vectors, plain or SIF-weighted, all texts in one product.

Shape letters: N texts, K distinct known words, V words of the vector file, D width of the vectors.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

Floats = NDArray[np.float64]
SIF_A = 1e-3
_WORD = re.compile(r"[^\W_]+")
_EULER_GAMMA = 0.5772156649


class Pooled(NamedTuple):
    """Texts as vectors: plain mean and SIF-weighted mean of their known words; all zero where none is known."""

    mean_ND: Floats
    sif_ND: Floats
    num_tokens_N: NDArray[np.int64]
    num_known_N: NDArray[np.int64]

    @property
    def known_share(self) -> Floats:
        """Share of each text's words that have a vector; 0 for a text without words."""
        return self.num_known_N / np.maximum(self.num_tokens_N, 1)


def words(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text, without punctuation.

    Letters are composed first and soft hyphens dropped: text from a PDF or a Mac may have ü as u and two dots, which would
    cut German words in pieces and leave English ones whole.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.replace("\u00ad", "")).lower())


def pool(tokens: Sequence[list[str]], vectors: "KeyedVectors") -> Pooled:
    """Return the pooled vectors of texts; the cosine of two plain means equals gensim's `n_similarity`.

    SIF weighs a word by a / (a + p(w)); p(w) as in `word_probabilities`.

    Args:
        tokens: the words of each text.

    Source: Arora, Liang and Ma 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings", algorithm 1.
    """
    place = vectors.key_to_index.get
    num_tokens_N = np.array([len(text) for text in tokens], dtype=np.int64)
    ids = np.fromiter((place(word, -1) for word in chain.from_iterable(tokens)), dtype=np.int64, count=int(num_tokens_N.sum()))
    text_of = np.repeat(np.arange(len(tokens)), num_tokens_N)
    known = ids >= 0
    num_known_N = np.bincount(text_of[known], minlength=len(tokens))
    ids_K, columns = np.unique(ids[known], return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(num_known_N)])
    counts_NK = csr_array((np.ones(len(columns)), columns, starts), shape=(len(tokens), len(ids_K)))
    vectors_KD = np.asarray(vectors.vectors[ids_K], dtype=np.float64)
    weighted_KD = vectors_KD * (SIF_A / (SIF_A + word_probabilities(vectors, ids_K)))[:, None]
    divisor_N1 = np.maximum(num_known_N, 1)[:, None]
    return Pooled(counts_NK @ vectors_KD / divisor_N1, counts_NK @ weighted_KD / divisor_N1, num_tokens_N, num_known_N)


def word_probabilities(vectors: "KeyedVectors", ids_K: NDArray[np.int64]) -> Floats:
    """Return p(w) of words: from their counts where the vectors carry true ones, else from their rank by Zipf's law.

    gensim makes up counts (V, V - 1, ... 1) for files without any: those are taken for what they are.
    """
    counts_V = vectors.expandos.get("count")
    if counts_V is None or not len(counts_V) or _made_up(np.asarray(counts_V)):
        return np.asarray(1 / ((ids_K + 1) * (math.log(len(vectors.key_to_index)) + _EULER_GAMMA)))
    return np.asarray(counts_V, dtype=np.float64)[ids_K] / float(np.sum(counts_V))


def without_component(sif_ND: Floats, component_D: Floats) -> Floats:
    """Return unit vectors without what they have along a direction."""
    return unit(sif_ND - np.outer(sif_ND @ component_D, component_D))


def first_component(sif_RD: Floats) -> Floats:
    """Return the direction (length D) that the texts share most: their first right singular vector."""
    return np.linalg.svd(sif_RD, full_matrices=False)[2][0]


def unit(vectors_ND: Floats) -> Floats:
    """Return the rows at length 1; a row of (almost) zero becomes nan, as it has no direction."""
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.divide(vectors_ND, norms_N1, out=np.full_like(vectors_ND, np.nan), where=norms_N1 > 1e-9)


def _made_up(counts_V: NDArray[np.int64]) -> bool:
    return bool(np.array_equal(counts_V, np.arange(len(counts_V), 0, -1)))
