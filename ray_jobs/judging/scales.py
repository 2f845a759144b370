"""What a similarity means in this run: its values to the right sample answer beside those to other questions'."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_WRONG_PAIRS = 50_000


class Scale(NamedTuple):
    """A metric's mean to the question's own sample answer and to those of other questions of its language.

    `spread` is the distance of the 5th and the 95th percentile of the wrong ones; 0 where there are none.
    """

    right_mean: float | None
    wrong_mean: float | None
    spread: float


def scale_of(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> Scale:
    """Return the scale of a metric; nan (no score) is left out."""
    right, wrong = right[~np.isnan(right)], wrong[~np.isnan(wrong)]
    spread = float(np.subtract(*np.percentile(wrong, [95, 5]))) if wrong.size else 0.0
    return Scale(float(right.mean()) if right.size else None, float(wrong.mean()) if wrong.size else None, spread)


def with_tie_band(scale: Scale, share: float) -> dict[str, float | None]:
    """Return a scale for the manifest, with the largest difference that counts as a tie: a share of the spread."""
    return {**scale._asdict(), "tie_band": share * scale.spread}


def wrong_pairs(right_N: NDArray[np.int64], languages: Sequence[str]) -> NDArray[np.int64]:
    """Return pairs (2, number) of an answer and a sample answer of another question in the same language, in random order.

    All of them, or 50,000 drawn at random, always the same.

    Args:
        right_N: each answer's question.
        languages: each question's.
    """
    codes = np.unique(np.asarray(languages, dtype=str), return_inverse=True)[1]
    generator = np.random.default_rng(0)
    num, num_references = len(right_N), len(codes)
    if num * num_references <= 4 * MOST_WRONG_PAIRS:
        answers, references = np.divmod(generator.permutation(num * num_references), max(1, num_references))
    else:
        answers, references = generator.integers(0, [[num], [num_references]], size=(2, 4 * MOST_WRONG_PAIRS))
    wrong = (right_N[answers] != references) & (codes[right_N[answers]] == codes[references])
    return np.stack([answers[wrong], references[wrong]])[:, :MOST_WRONG_PAIRS]
