"""How near an answer is to its sample answer: cosines of word vectors and word overlap, all answers at once.

Shape letters: N texts, R sample answers, W pairs of an answer and a wrong sample answer, D width of the vectors.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_jobs.core.records import Similarity, Winner
from ray_jobs.judging.pooling import Floats, Pooled, first_component, pool, unit, without_component, words
from ray_jobs.judging.scales import Scale, scale_of, wrong_pairs
from ray_jobs.judging.soft_cosine import make_bag, soft_cosine
from ray_jobs.judging.word_overlap import content_words, token_f1

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

Row = dict[str, Any]
Ints = NDArray[np.int64]
FAILED = "answer failed"
"""How the reason of an answer begins that was never given: its 0 words are no length."""
METRICS = ("cosine", "sif_cosine", "token_f1", "soft_cosine", "content_f1")
MOST_WORD_PAIRS = 5_000
"""Wrong pairs of the metrics that are computed pair by pair."""


def score_answers(
    questions: list[Row], answers: list[Row], vectors: "KeyedVectors", *, min_known_share: float
) -> tuple[list[Similarity], dict[str, Scale]]:
    """Return the similarities of each answer to its question's sample answer, and the scale of each metric.

    An answer that cannot be scored has None and a reason, never 0. The SIF component comes from the sample answers
    alone, so one more model changes no other's score.

    Args:
        questions: Question rows.
        answers: Answer rows to these questions, of any number of models.
        min_known_share: share of words with a vector that answer and sample answer both need for a cosine.
    """
    scorer = _Scorer(questions, answers, vectors, min_known_share)
    pairs = wrong_pairs(scorer.right_N, [question.get("language", "en") for question in questions])
    found, scales = {}, {}
    for metric, (score, most) in scorer.metrics().items():
        found[metric] = score(np.arange(len(answers)), scorer.right_N)
        scales[metric] = scale_of(found[metric], score(*pairs[:, :most]))
    return [scorer.row(i, {metric: values[i] for metric, values in found.items()}) for i in range(len(answers))], scales


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


class _Scorer:
    """All texts, tokenised and pooled once; a metric takes (answers, sample answers) by index and returns nan for no score."""

    def __init__(self, questions: list[Row], answers: list[Row], vectors: "KeyedVectors", floor: float):
        place = {question["question_id"]: i for i, question in enumerate(questions)}
        languages = [question.get("language", "en") for question in questions]
        self._answers, self._floor = answers, floor
        self.right_N: Ints = np.array([place[answer["question_id"]] for answer in answers], dtype=np.int64)
        self._tokens = [words(_text(answer)) for answer in answers]
        self._sample_tokens = [words(question["reference"]) for question in questions]
        self._content = [content_words(text, languages[r]) for text, r in zip(self._tokens, self.right_N, strict=True)]
        self._sample_content = [content_words(text, language) for text, language in zip(self._sample_tokens, languages, strict=True)]
        self._pooled, self._samples = pool(self._tokens, vectors), pool(self._sample_tokens, vectors)
        self._usable_N, self._usable_R = _usable(self._pooled, floor), _usable(self._samples, floor)
        self._bags = [make_bag(text, vectors) for text in self._tokens]
        self._sample_bags = [make_bag(text, vectors) for text in self._sample_tokens]

    def metrics(self) -> dict[str, tuple[Callable[[Ints, Ints], Floats], int | None]]:
        """Return {metric: (its function, the most wrong pairs it is asked for)}, in the order of METRICS."""
        plain = unit(self._pooled.mean_ND), unit(self._samples.mean_ND)
        return {
            "cosine": (lambda i, r: self._where_usable(i, r, np.sum(plain[0][i] * plain[1][r], axis=1)), None),
            "sif_cosine": (self._sif_cosine(), None),
            "token_f1": (lambda i, r: self._f1(self._tokens, self._sample_tokens, i, r), MOST_WORD_PAIRS),
            "soft_cosine": (self._soft_cosine, MOST_WORD_PAIRS),
            "content_f1": (lambda i, r: self._f1(self._content, self._sample_content, i, r), MOST_WORD_PAIRS),
        }

    def row(self, i: int, scores: dict[str, float]) -> Similarity:
        """Return the record of one answer."""
        answer, num_tokens = self._answers[i], int(self._pooled.num_tokens_N[i])
        values = {metric: None if math.isnan(score) else float(score) for metric, score in scores.items()}
        return Similarity(
            answer_id=answer["answer_id"],
            question_id=answer["question_id"],
            model=answer["model"],
            oov_share=float(1 - self._pooled.known_share[i]) if num_tokens else 0.0,
            num_tokens=num_tokens,
            reason="" if values["cosine"] is not None else self._reason(i),
            cosine=values["cosine"],
            sif_cosine=values["sif_cosine"],
            token_f1=values["token_f1"],
            soft_cosine=values["soft_cosine"],
            content_f1=values["content_f1"],
        )

    def _where_usable(self, i: Ints, r: Ints, values: Floats) -> Floats:
        return np.where(self._usable_N[i] & self._usable_R[r], values, np.nan)

    def _sif_cosine(self) -> Callable[[Ints, Ints], Floats]:
        if self._usable_R.sum() < 2:
            return lambda i, r: np.full(len(i), np.nan)  # one text is its own first component: nothing is left of it
        component_D = first_component(self._samples.sif_ND[self._usable_R])
        left_ND, left_RD = (without_component(pooled.sif_ND, component_D) for pooled in (self._pooled, self._samples))
        return lambda i, r: self._where_usable(i, r, np.sum(left_ND[i] * left_RD[r], axis=1))

    def _f1(self, answers: list[list[str]], references: list[list[str]], i: Ints, r: Ints) -> Floats:
        """Return the F1 of pairs; nan for an answer without words and for a sample answer of which nothing is asked."""
        scored = (self._pooled.num_tokens_N[i] > 0) & np.array([bool(references[b]) for b in r], dtype=bool)
        return np.where(scored, [token_f1(answers[a], references[b]) for a, b in zip(i, r, strict=True)], np.nan)

    def _soft_cosine(self, answers: Ints, references: Ints) -> Floats:
        found = [soft_cosine(self._bags[i], self._sample_bags[r]) for i, r in zip(answers, references, strict=True)]
        return self._where_usable(answers, references, np.array(found, dtype=np.float64))

    def _reason(self, i: int) -> str:
        answer, known, floor = self._answers[i], self._pooled.known_share[i], self._floor
        if answer["finish_reason"] == "error":
            return f"{FAILED}: {answer.get('error') or 'no reason given'}"
        if not self._tokens[i]:
            return "empty answer"
        if known == 0 or known < floor:
            return f"{known:.0%} of the answer's words have a vector, fewer than {floor:.0%}"
        return f"{self._samples.known_share[self.right_N[i]]:.0%} of the sample answer's words have a vector, fewer than {floor:.0%}"


def _usable(pooled: Pooled, floor: float) -> NDArray[np.bool_]:
    return (pooled.known_share >= floor) & (pooled.num_known_N > 0)


def _text(answer: Row) -> str:
    return "" if answer["finish_reason"] == "error" else answer["text"]
