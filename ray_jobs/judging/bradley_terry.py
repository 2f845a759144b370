"""One scale for three models or more: Bradley-Terry strengths, with intervals over questions.

Shape letters: Q questions, M models, S draws.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ray_jobs.judging.bootstrap import middle_95, resampled_sums

Floats = NDArray[np.float64]
GHOST_GAMES = 0.1
SAMPLES = 1000
_MOST_STEPS = 100


class Strength(NamedTuple):
    """A model's strength in log odds against the mean of all models (0), with its 95% interval.

    The odds that one beats another are exp(difference of their strengths).
    """

    model: str
    strength: float
    low: float
    high: float


class Meeting(NamedTuple):
    """One question on which two models met; `score` is a's, in [0, 1], over all orders and repeats."""

    question_id: str
    model_a: str
    model_b: str
    score: float


def bradley_terry(meetings: Iterable[Meeting], *, seed: int, samples: int = SAMPLES) -> list[Strength]:
    """Return the strengths of all models that met, the strongest first.

    The bootstrap draws questions with all their meetings. Drawing meetings or single games would count one question's
    games as independent and give intervals that are too narrow. A tie is half a win. What is drawn from also holds, for
    each two models that met, one question more that either won: else a model that never lost would lose in no draw, and its
    interval would have no width.

    Args:
        meetings: of all pairs and questions.
        seed: of the bootstrap.
        samples: of the bootstrap.

    Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs"; Agresti and Caffo 2000, "Simple and effective
        confidence intervals for proportions", for a win and a loss more.
    """
    meetings = list(meetings)
    models = sorted({model for meeting in meetings for model in (meeting.model_a, meeting.model_b)})
    if not models:
        return []
    wins_QMM = _wins(meetings, models)
    strengths_M = strengths(wins_QMM.sum(axis=0)[None])[0]
    drawn_from = np.concatenate([wins_QMM, _one_win_each(wins_QMM.sum(axis=0))])
    drawn = resampled_sums(drawn_from.reshape(len(drawn_from), -1), seed=seed, samples=samples)
    low_M, high_M = middle_95(strengths(drawn.reshape(samples, len(models), len(models))))
    found = zip(models, strengths_M, low_M, high_M, strict=True)
    return sorted((Strength(model, *map(float, figures)) for model, *figures in found), key=lambda entry: (-entry.strength, entry.model))


def strengths(wins_SMM: Floats) -> Floats:
    """Return strengths (S, M) in log odds, each row's mean 0, from tables whose [s, i, j] counts i's wins over j.

    Every model also draws a tenth of a game with a ghost of middle strength. Without it a model that never lost (as
    happens in some draws) would be infinitely strong; with 100 questions it moves no strength by more than about 0.001
    unless a model wins nearly always.
    """
    games_SMM = wins_SMM + wins_SMM.transpose(0, 2, 1)
    won_SM = wins_SMM.sum(axis=2)
    x_SM = np.zeros(won_SM.shape)
    for _ in range(_MOST_STEPS):
        chance_SMM = expit(x_SM[:, :, None] - x_SM[:, None, :])
        ghost_SM = expit(x_SM)
        slope_SM = won_SM - (games_SMM * chance_SMM).sum(axis=2) + GHOST_GAMES * (0.5 - ghost_SM)
        curvature_SMM = games_SMM * chance_SMM * (1 - chance_SMM)
        own_SM = curvature_SMM.sum(axis=2) + GHOST_GAMES * ghost_SM * (1 - ghost_SM)
        step_SM = np.linalg.solve(own_SM[:, :, None] * np.eye(x_SM.shape[1]) - curvature_SMM, slope_SM[:, :, None])[:, :, 0]
        largest_S1 = np.abs(step_SM).max(axis=1, keepdims=True)
        x_SM += step_SM / np.maximum(1.0, largest_S1)  # at most 1: Newton may overshoot
        if largest_S1.max() < 1e-9:
            break
    centred: Floats = x_SM - x_SM.mean(axis=1, keepdims=True)
    return centred


def _one_win_each(wins_MM: Floats) -> Floats:
    """Return a table for each ordered two models that met, with one win of the first."""
    winners, losers = np.nonzero(wins_MM + wins_MM.T)
    tables = np.zeros((len(winners), *wins_MM.shape))
    tables[np.arange(len(winners)), winners, losers] = 1
    return tables


def _wins(meetings: Sequence[Meeting], models: list[str]) -> Floats:
    place = {model: i for i, model in enumerate(models)}
    row_of = {id_: i for i, id_ in enumerate(dict.fromkeys(meeting.question_id for meeting in meetings))}
    wins_QMM = np.zeros((len(row_of), len(models), len(models)))
    for meeting in meetings:
        q, a, b = row_of[meeting.question_id], place[meeting.model_a], place[meeting.model_b]
        wins_QMM[q, a, b] += meeting.score
        wins_QMM[q, b, a] += 1 - meeting.score
    return wins_QMM
