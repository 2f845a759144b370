"""The length-controlled win rate against a general optimiser, and what length must and must not move."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from ray_jobs.judging.length_control import fit_logistic, length_controlled


def simulated(generator, *, quality, slope, num=200, extra=0.0):
    """Side a is better by `quality` log odds at equal length; the judge adds `slope` x tanh of the length difference."""
    length_b = generator.integers(50, 150, num)
    length_a = np.maximum(1, length_b + generator.normal(extra, 30, num).astype(int))
    difference = length_a - length_b
    chance = expit(quality + slope * np.tanh(difference / difference.std()))
    return (generator.random(num) < chance).astype(float), length_a, length_b


def test_weights_maximise_the_penalised_likelihood():
    generator = np.random.default_rng(0)
    design = np.stack([np.ones(60), generator.normal(size=60)], axis=1)
    y = generator.choice([0.0, 0.5, 1.0], 60)

    def loss(w):
        p = expit(design @ w)
        return -np.sum(y * np.log(p) + (1 - y) * np.log(1 - p)) + w @ w / (2 * 9)

    np.testing.assert_allclose(fit_logistic(design, y)[0], minimize(loss, np.zeros(2), tol=1e-12).x, atol=1e-5)


def test_a_longer_and_equally_good_side_is_brought_back_to_one_half():
    scores, a, b = simulated(np.random.default_rng(1), quality=0.0, slope=2.0, num=4000, extra=40)
    found = length_controlled(scores, a, b)
    assert scores.mean() > 0.7
    assert found.rate == pytest.approx(0.5, abs=0.04) and found.slope == pytest.approx(2.0, abs=0.3)


def test_intervals_cover_the_planted_rate_and_slope():
    generator = np.random.default_rng(2)
    found = [length_controlled(*simulated(generator, quality=0.4, slope=1.0, extra=15)) for _ in range(200)]
    assert np.mean([run.low <= expit(0.4) <= run.high for run in found]) >= 0.92
    assert np.mean([run.slope_low <= 1.0 <= run.slope_high for run in found]) >= 0.92


def test_without_an_effect_of_length_the_rate_is_the_raw_one():
    scores, a, b = simulated(np.random.default_rng(3), quality=0.5, slope=0.0, num=5000)
    found = length_controlled(scores, a, b)
    assert found.rate == pytest.approx(scores.mean(), abs=0.01)
    assert found.slope_low < 0 < found.slope_high


def test_swapping_sides_mirrors_the_rate():
    scores, a, b = simulated(np.random.default_rng(4), quality=0.5, slope=1.0)
    one, two = length_controlled(scores, a, b), length_controlled(1 - scores, b, a)
    assert one.rate == pytest.approx(1 - two.rate) and one.slope == pytest.approx(two.slope)
    assert one.low == pytest.approx(1 - two.high)


def test_where_length_alone_decides_the_fit_is_finite_and_unsure():
    length = np.arange(1, 41)
    found = length_controlled((length > 20).astype(float), length, np.full(40, 20.5))
    assert found.slope > 2 and found.high - found.low > 0.3


def test_too_few_questions_or_equal_lengths_have_no_rate():
    assert length_controlled([1.0] * 20, [5] * 20, [4] * 20).rate is None  # all differences are the same
    assert length_controlled([1.0], [5], [4])[:6] == (None,) * 6
    assert length_controlled([], [], []).num_questions == 0
