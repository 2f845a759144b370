"""Strengths against the closed form, a general optimiser and planted values."""

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit

from ray_jobs.judging.bradley_terry import Meeting, bradley_terry, strengths


def meetings(generator, planted, num_questions, *, noise=0.0):
    """Each pair meets on each question; `noise` is the sd of what a question adds to each model's strength, for all its games."""
    models = sorted(planted)
    found = []
    for q in range(num_questions):
        shift = dict(zip(models, generator.normal(0, noise, len(models)), strict=True))
        for i, a in enumerate(models):
            for b in models[i + 1 :]:
                chance = expit(planted[a] + shift[a] - planted[b] - shift[b])
                found.append(Meeting(str(q), a, b, float(generator.random() < chance)))
    return found


def test_two_models_have_the_log_odds_of_their_wins():
    found = bradley_terry([Meeting(str(q), "x", "y", float(q < 70)) for q in range(100)], seed=0, samples=50)
    assert [entry.model for entry in found] == ["x", "y"]
    assert found[0].strength - found[1].strength == pytest.approx(np.log(70 / 30), abs=2e-3)


def test_strengths_maximise_the_likelihood():
    wins = np.random.default_rng(1).integers(1, 30, (4, 4)).astype(float)
    np.fill_diagonal(wins, 0)

    def loss(x):
        return -np.sum(wins * np.log(expit(x[:, None] - x[None, :])))

    best = minimize(loss, np.zeros(4), tol=1e-12).x
    np.testing.assert_allclose(strengths(wins[None])[0], best - best.mean(), atol=5e-3)


def test_a_model_that_never_lost_is_strong_and_finite():
    found = bradley_terry([Meeting(str(q), "x", other, 1.0) for q in range(50) for other in ("y", "z")], seed=0, samples=50)
    assert found[0].model == "x" and 3 < found[0].strength < 50
    assert bradley_terry([], seed=0) == []


def test_a_model_that_never_lost_has_an_interval_that_more_questions_narrow():
    def lowest_odds(num):
        x, y = bradley_terry([Meeting(str(q), "x", "y", 1.0) for q in range(num)], seed=0)
        return x.low - y.high

    few, many = lowest_odds(10), lowest_odds(300)
    exact = [stats.binomtest(num, num).proportion_ci(method="exact").low for num in (10, 300)]
    assert [few, many] == pytest.approx(np.log(exact) - np.log1p(np.negative(exact)), abs=0.6)


def test_intervals_cover_planted_strengths_and_those_of_single_games_do_not():
    """A question's games share what the question adds; counted as independent they promise too much."""
    planted, generator = {"x": 0.6, "y": 0.0, "z": -0.6}, np.random.default_rng(2)
    many = bradley_terry(meetings(generator, planted, 10_000, noise=2.0), seed=0, samples=2)
    truth = {entry.model: entry.strength for entry in many}
    covered, by_game = [], []
    for run in range(40):
        once = meetings(generator, planted, 80, noise=2.0)
        tripled = [meeting._replace(question_id=f"{meeting.question_id}-{copy}") for meeting in once for copy in range(3)]
        covered += [entry.low <= truth[entry.model] <= entry.high for entry in bradley_terry(once, seed=run, samples=200)]
        by_game += [entry.low <= truth[entry.model] <= entry.high for entry in bradley_terry(tripled, seed=run, samples=200)]
    assert np.mean(covered) >= 0.9
    assert np.mean(by_game) < 0.8


def test_the_ranking_is_seeded():
    some = meetings(np.random.default_rng(3), {"x": 1.0, "y": 0.0, "z": -1.0}, 30)
    assert bradley_terry(some, seed=1, samples=50) == bradley_terry(some[::-1], seed=1, samples=50)
