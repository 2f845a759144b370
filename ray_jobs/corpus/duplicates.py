"""Near-duplicates by MinHash over word 3-grams: signatures are made anywhere, compared in one index."""

import numpy as np
from datasketch import MinHash, MinHashLSH

from ray_jobs.corpus.language import words

NUM_PERMUTATIONS = 128
"""Hash functions of a signature: the estimate's standard error is at most 0.5 / sqrt(128) = 0.044."""
_SCHEME = "affine32"
_SEED = 1
_GRAM = 3
_MISSES_COST = 0.9  # the index only proposes: a false proposal costs one comparison, a miss is for good


def signature(text: str) -> bytes:
    """Return the MinHash signature of a text's word 3-grams (of all its words where there are fewer): 512 bytes."""
    seen = words(text)
    grams = {" ".join(seen[i : i + _GRAM]) for i in range(max(1, len(seen) - _GRAM + 1))}
    sketch = MinHash(num_perm=NUM_PERMUTATIONS, seed=_SEED, scheme=_SCHEME)
    sketch.update_batch([gram.encode() for gram in sorted(grams)])
    return sketch.hashvalues.astype(np.uint32).tobytes()


def similarity(one: bytes, other: bytes) -> float:
    """Return the estimated Jaccard similarity of two signatures' 3-gram sets.

    Source: Broder 1997, On the resemblance and containment of documents.
    """
    return float(np.mean(np.frombuffer(one, np.uint32) == np.frombuffer(other, np.uint32)))


class NearDuplicates:
    """Everything kept so far, by signature. It holds about 1 kB for each text, and never the text.

    Args:
        threshold: similarity from which two texts count as the same.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        searched = min(max(threshold, 0.1), 0.99)
        self._index = MinHashLSH(threshold=searched, num_perm=NUM_PERMUTATIONS, weights=(1 - _MISSES_COST, _MISSES_COST))
        self._kept: dict[str, bytes] = {}

    def find(self, text_signature: bytes) -> str | None:
        """Return the name of the most similar text kept, where it counts as the same."""
        proposed = ((similarity(text_signature, self._kept[name]), name) for name in self._index.query(_sketch(text_signature)))
        score, name = max(proposed, default=(-1.0, ""))
        return name if score >= self._threshold else None

    def add(self, name: str, text_signature: bytes) -> None:
        """Keep a text under a name not used before."""
        self._kept[name] = text_signature
        self._index.insert(name, _sketch(text_signature))


def _sketch(text_signature: bytes) -> MinHash:
    values = np.frombuffer(text_signature, np.uint32)
    return MinHash(num_perm=NUM_PERMUTATIONS, seed=_SEED, scheme=_SCHEME, hashvalues=values)
