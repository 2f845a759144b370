"""How good an encoder is: questions that find their sample answers, and cosines that follow a teacher's grades.

Shapes: N texts, D width.
"""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[list[str]], NDArray[np.float32]]
"""From texts to embeddings of length 1, shape N, D."""
CUT_OFF = 10


class Graded(NamedTuple):
    """One question of the SAF data set with its sample answer and graded student answers."""

    question: str
    reference: str
    answers: list[str]
    scores: list[float]


def retrieval(encode: Encode, questions: list[str], answers: list[str]) -> dict[str, float]:
    """Return how well question i finds answer i among all answers: mean reciprocal rank within 10, and the share found first."""
    scores_QA = encode(questions) @ encode(answers).T
    right_Q = scores_QA.diagonal()
    rank_Q = 1 + (scores_QA > right_Q[:, None]).sum(axis=1)
    return {"mrr_at_10": float(np.where(rank_Q <= CUT_OFF, 1 / rank_Q, 0).mean()), "recall_at_1": float((rank_Q == 1).mean())}


def grade_correlation(encode: Encode, graded: list[Graded]) -> dict[str, float]:
    """Return Spearman's correlation of cosine(answer, sample answer) with the grade: within a question, mean over questions."""
    from scipy.stats import spearmanr

    found = []
    for item in graded:
        embeddings_ND = encode([item.reference, *item.answers])
        found.append(spearmanr(embeddings_ND[1:] @ embeddings_ND[0], item.scores).statistic)
    return {"saf_spearman": float(np.mean(found))}


def read_saf(folder: Path, *, answers_each: int) -> list[Graded]:
    """Return the English questions of SAF whose kept answers differ in grade.

    Args:
        folder: of the data set, with data/training/english and data/unseen_questions/english.
        answers_each: keep the first so many answers of a question.

    Source:
        Filighera et al. 2022, "Your Answer is Incorrect... Would you like to know why?" (ACL).
    """
    files = sorted(file for part in ("training", "unseen_questions") for file in (folder / "data" / part / "english").glob("*.xml"))
    graded = [_graded(ET.parse(file).getroot(), answers_each) for file in files]
    return [item for item in graded if len(set(item.scores)) > 1]


def _graded(root: ET.Element, answers_each: int) -> Graded:
    found = []
    for answer in root.iterfind("studentAnswers/studentAnswer"):
        text, score = answer.findtext("response", "").strip(), answer.findtext("score")
        if text and score is not None:
            found.append((text, float(score)))
    found = found[:answers_each]
    reference = root.findtext("referenceAnswers/referenceAnswer", "").strip()
    return Graded(root.findtext("questionText", "").strip(), reference, [text for text, _ in found], [score for _, score in found])
