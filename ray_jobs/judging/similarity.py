"""How near an answer is to its sample answer: Word2Vec cosine, SIF cosine and token F1, all answers at once.

Shape letters: N texts, R sample answers, K distinct known words, D width of the vectors.
"""

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ray_jobs.core.records import Similarity, Winner

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

Row = dict[str, Any]
Floats = NDArray[np.float64]
SIF_A = 1e-3
MOST_WRONG_REFERENCES = 200
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


class Scale(NamedTuple):
    """What a cosine means in this run: to the right sample answer, and to those of other questions.

    `spread` is the distance of the 5th and the 95th percentile of the wrong ones; 0 where there are none.
    """

    right_mean: float | None
    wrong_mean: float | None
    spread: float


def words(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text, without punctuation."""
    return _WORD.findall(text.lower())


def token_f1(answer: list[str], reference: list[str]) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, counted with repetitions.

    Source: SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250), section 6.1.
    """
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def pool(texts: list[str], vectors: "KeyedVectors") -> Pooled:
    """Return the pooled vectors of texts; the cosine of two plain means equals gensim's `n_similarity`.

    SIF weighs a word by a / (a + p(w)), with p(w) from the word's rank by Zipf's law, as vector files carry no counts.

    Source: Arora, Liang and Ma 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings", algorithm 1.
    """
    index = vectors.key_to_index
    tokens = [words(text) for text in texts]
    known = [[index[word] for word in text if word in index] for text in tokens]
    num_known_N = np.array([len(ids) for ids in known], dtype=np.int64)
    ids_K, columns = np.unique(np.array([i for ids in known for i in ids], dtype=np.int64), return_inverse=True)
    rows = np.repeat(np.arange(len(texts)), num_known_N)
    counts_NK = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(ids_K)))
    vectors_KD = np.asarray(vectors.vectors[ids_K], dtype=np.float64)
    probability_K = 1 / ((ids_K + 1) * (math.log(len(index)) + _EULER_GAMMA))
    weighted_KD = vectors_KD * (SIF_A / (SIF_A + probability_K))[:, None]
    divisor_N1 = np.maximum(num_known_N, 1)[:, None]
    num_tokens_N = np.array([len(text) for text in tokens], dtype=np.int64)
    return Pooled(counts_NK @ vectors_KD / divisor_N1, counts_NK @ weighted_KD / divisor_N1, num_tokens_N, num_known_N)


def first_component(sif_RD: Floats) -> Floats:
    """Return the direction (length D) that the texts share most: their first right singular vector."""
    return np.linalg.svd(sif_RD, full_matrices=False)[2][0]


def unit(vectors_ND: Floats) -> Floats:
    """Return the rows at length 1; a row of (almost) zero becomes nan, as it has no direction."""
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.divide(vectors_ND, norms_N1, out=np.full_like(vectors_ND, np.nan), where=norms_N1 > 1e-9)


def score_answers(
    questions: list[Row], answers: list[Row], vectors: "KeyedVectors", *, min_known_share: float
) -> tuple[list[Similarity], Scale]:
    """Return the similarity of each answer to its question's sample answer, and the scale of the cosines.

    An answer that cannot be scored has None and a reason, never 0. The SIF component comes from the sample answers
    alone, so one more model changes no other's score.

    Args:
        questions: Question rows.
        answers: Answer rows to these questions, of any number of models.
        min_known_share: share of words with a vector that answer and sample answer both need for a cosine.
    """
    place = {question["question_id"]: i for i, question in enumerate(questions)}
    right_N = np.array([place[answer["question_id"]] for answer in answers], dtype=np.int64)
    references = pool([question["reference"] for question in questions], vectors)
    pooled = pool([_text(answer) for answer in answers], vectors)
    usable_R = _usable(references, min_known_share)
    usable_N = _usable(pooled, min_known_share) & usable_R[right_N]
    mean_ND, mean_RD = unit(pooled.mean_ND), unit(references.mean_ND)
    cosine_N = np.where(usable_N, np.sum(mean_ND * mean_RD[right_N], axis=1), np.nan)
    sif_N = np.where(usable_N, _sif_cosines(pooled.sif_ND, references.sif_ND, right_N, usable_R), np.nan)
    rows = []
    for i, (answer, r) in enumerate(zip(answers, right_N, strict=True)):
        scored = bool(usable_N[i])
        reason = "" if scored else _reason(answer, pooled.known_share[i], references.known_share[r], min_known_share)
        rows.append(
            Similarity(
                answer_id=answer["answer_id"],
                question_id=answer["question_id"],
                model=answer["model"],
                cosine=float(cosine_N[i]) if scored else None,
                sif_cosine=float(sif_N[i]) if not math.isnan(sif_N[i]) else None,
                token_f1=token_f1(words(_text(answer)), words(questions[r]["reference"])) if pooled.num_tokens_N[i] else None,
                oov_share=float(1 - pooled.known_share[i]) if pooled.num_tokens_N[i] else 0.0,
                num_tokens=int(pooled.num_tokens_N[i]),
                reason=reason,
            )
        )
    return rows, _scale(cosine_N, mean_ND[usable_N], mean_RD, right_N[usable_N], usable_R)


def cos_winner(cosine_a: float | None, cosine_b: float | None, *, tie_band: float) -> Winner | None:
    """Return who is nearer to the sample answer; None where either has no cosine.

    Args:
        tie_band: largest difference of the cosines that counts as a tie.
    """
    if cosine_a is None or cosine_b is None:
        return None
    if abs(cosine_a - cosine_b) <= tie_band:
        return "tie"
    return "a" if cosine_a > cosine_b else "b"


def _usable(pooled: Pooled, min_known_share: float) -> NDArray[np.bool_]:
    return (pooled.num_known_N > 0) & (pooled.known_share >= min_known_share)


def _sif_cosines(sif_ND: Floats, sif_RD: Floats, right_N: NDArray[np.int64], usable_R: NDArray[np.bool_]) -> Floats:
    if usable_R.sum() < 2:
        return np.full(len(sif_ND), np.nan)  # one text is its own first component: nothing is left of it
    component_D = first_component(sif_RD[usable_R])
    left_ND, left_RD = (unit(x - np.outer(x @ component_D, component_D)) for x in (sif_ND, sif_RD))
    return np.sum(left_ND * left_RD[right_N], axis=1)


def _scale(cosine_N: Floats, mean_ND: Floats, mean_RD: Floats, right_N: NDArray[np.int64], usable_R: NDArray[np.bool_]) -> Scale:
    others = np.flatnonzero(usable_R)[:MOST_WRONG_REFERENCES]
    wrong = (mean_ND @ mean_RD[others].T)[right_N[:, None] != others[None, :]]
    right = cosine_N[~np.isnan(cosine_N)]
    spread = float(np.subtract(*np.percentile(wrong, [95, 5]))) if wrong.size else 0.0
    return Scale(float(right.mean()) if right.size else None, float(wrong.mean()) if wrong.size else None, spread)


def _text(answer: Row) -> str:
    return "" if answer["finish_reason"] == "error" else answer["text"]


def _reason(answer: Row, known: float, reference_known: float, floor: float) -> str:
    if answer["finish_reason"] == "error":
        return f"answer failed: {answer.get('error') or 'no reason given'}"
    if not words(answer["text"]):
        return "empty answer"
    if known == 0 or known < floor:
        return f"{known:.0%} of the answer's words have a vector, fewer than {floor:.0%}"
    return f"{reference_known:.0%} of the sample answer's words have a vector, fewer than {floor:.0%}"
