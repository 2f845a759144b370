"""The win rate two models would have if their answers were equally long.

Shape letters: Q questions, P parameters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.float64]
PRIOR_SD = 3.0
MIN_QUESTIONS = 10
_STEPS = 50


class LengthControlled(NamedTuple):
    """Win rate of side a at equal length with its 95% interval, and what length does to the verdict.

    `slope` is the change in log odds from equal length to an answer that is far longer than the other (tanh at 1);
    its interval is `slope_low` to `slope_high`. All None where there are fewer than 10 questions or all are equally long.
    """

    rate: float | None
    low: float | None
    high: float | None
    slope: float | None
    slope_low: float | None
    slope_high: float | None
    num_questions: int


def length_controlled(scores: Sequence[float], lengths_a: Sequence[int], lengths_b: Sequence[int]) -> LengthControlled:
    """Return the win rate of side a that a logistic regression on the length difference predicts at difference 0.

    The regressor is tanh(difference / its standard deviation), as in AlpacaEval 2; its term for a question's difficulty
    needs many models and is left out. Scores may be parts (ties, orders that disagree). A weak normal prior (sd 3 in log
    odds) keeps the fit finite where length alone tells who wins; then the interval is wide, as it should be. Intervals
    come from the sandwich variance with one row a question.

    Args:
        scores: of side a, one a question, in [0, 1].
        lengths_a: lengths of side a's answers, in any one unit.
        lengths_b: lengths of side b's.

    Source: Dubois et al. 2024 (arXiv:2404.04475), section 3; White 1980 for the variance.
    """
    y_Q = np.asarray(scores, dtype=np.float64)
    difference_Q = np.asarray(lengths_a, dtype=np.float64) - np.asarray(lengths_b, dtype=np.float64)
    scale = float(difference_Q.std()) if len(y_Q) else 0.0
    if len(y_Q) < MIN_QUESTIONS or scale == 0:
        return LengthControlled(None, None, None, None, None, None, len(y_Q))
    design_QP = np.stack([np.ones(len(y_Q)), np.tanh(difference_Q / scale)], axis=1)
    (at_zero, slope), (sd_zero, sd_slope) = fit_logistic(design_QP, y_Q)
    low, high = at_zero - 1.96 * sd_zero, at_zero + 1.96 * sd_zero
    return LengthControlled(
        rate=float(expit(at_zero)),
        low=float(expit(low)),
        high=float(expit(high)),
        slope=float(slope),
        slope_low=float(slope - 1.96 * sd_slope),
        slope_high=float(slope + 1.96 * sd_slope),
        num_questions=len(y_Q),
    )


def fit_logistic(design_QP: Floats, y_Q: Floats, *, prior_sd: float = PRIOR_SD) -> tuple[Floats, Floats]:
    """Return the weights of a logistic regression with a normal prior, and their robust standard deviations.

    Args:
        design_QP: one row a question.
        y_Q: outcomes in [0, 1].
        prior_sd: of each weight.
    """
    weights_P = np.zeros(design_QP.shape[1])
    prior_PP = np.eye(len(weights_P)) / prior_sd**2
    for _ in range(_STEPS):
        chance_Q = expit(design_QP @ weights_P)
        curvature_PP = (design_QP * (chance_Q * (1 - chance_Q))[:, None]).T @ design_QP + prior_PP
        step_P = np.linalg.solve(curvature_PP, design_QP.T @ (y_Q - chance_Q) - prior_PP @ weights_P)
        weights_P = weights_P + step_P / max(1.0, float(np.abs(step_P).max()))  # at most 1: Newton may overshoot
        if np.abs(step_P).max() < 1e-10:
            break
    inverse_PP = np.linalg.inv(curvature_PP)
    score_QP = design_QP * (y_Q - chance_Q)[:, None]
    # the prior's own share keeps the variance from vanishing where the data are fitted without an error
    variance_PP = inverse_PP @ (score_QP.T @ score_QP * len(y_Q) / (len(y_Q) - len(weights_P)) + prior_PP) @ inverse_PP
    return weights_P, np.sqrt(np.diag(variance_PP))
