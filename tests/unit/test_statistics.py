"""Intervals, tests and agreement against scipy, hand-worked values and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from ray_jobs.judging.statistics import agreement, questions_needed, win_rate


def winners(a, b, ties=0, unscored=0):
    return ["a"] * a + ["b"] * b + ["tie"] * ties + [None] * unscored


def test_the_known_result_44_to_56_is_not_significant():
    rate = win_rate(winners(44, 56))
    assert rate.p_value == pytest.approx(0.2713, abs=1e-4)
    assert (1 - rate.high, 1 - rate.low) == (pytest.approx(0.462, abs=1e-3), pytest.approx(0.653, abs=1e-3))


def test_the_known_result_66_to_34_is():
    rate = win_rate(winners(66, 34))
    assert rate.p_value == pytest.approx(0.0018, abs=1e-4)
    assert (rate.low, rate.high) == (pytest.approx(0.563, abs=1e-3), pytest.approx(0.745, abs=1e-3))


def test_p_is_the_sum_of_outcomes_as_rare():
    a, b = 9, 3
    probabilities = stats.binom.pmf(np.arange(13), 12, 0.5)
    expected = probabilities[probabilities <= probabilities[a] * (1 + 1e-9)].sum()
    assert win_rate(winners(a, b)).p_value == pytest.approx(expected)


def test_ties_and_unscored_are_counted_beside():
    rate = win_rate(winners(3, 1, ties=5, unscored=2))
    assert rate[:4] == (3, 1, 5, 2)
    assert rate.rate == 0.75
    assert rate[4:] == win_rate(winners(3, 1))[4:]


def test_no_decided_game_has_no_rate():
    for found in (win_rate([]), win_rate(winners(0, 0, ties=4, unscored=1))):
        assert found[4:] == (None, None, None, None)


def test_swapping_sides_mirrors_the_rate():
    one, two = win_rate(winners(30, 50)), win_rate(winners(50, 30))
    assert one.p_value == pytest.approx(two.p_value)
    assert (one.rate, one.low, one.high) == (pytest.approx(1 - two.rate), pytest.approx(1 - two.high), pytest.approx(1 - two.low))


@pytest.mark.parametrize(("rate", "num"), [(0.56, 543), (0.60, 194), (0.65, 85), (0.44, 543)])
def test_questions_needed(rate, num):
    assert questions_needed(rate) == num


def test_questions_needed_gives_the_power():
    num = questions_needed(0.6)
    critical = stats.binom.isf(0.025, num, 0.5)
    assert stats.binom.sf(critical - 1, num, 0.6) == pytest.approx(0.8, abs=0.03)
    assert questions_needed(0.5) is None


def test_agreement_of_the_textbook_table():
    first = ["a"] * 25 + ["b"] * 25
    second = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    found = agreement(first, second, labels=("a", "b"))
    assert found.table == [[20, 5], [10, 15]]
    assert found.share == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    assert found.low < 0.4 < found.high


def test_identical_and_opposite_judges():
    some = winners(10, 10)
    assert agreement(some, some).kappa == pytest.approx(1)
    assert agreement(some, some[::-1]).kappa == pytest.approx(-1)


def test_kappa_of_independent_judges_covers_zero_in_most_runs():
    generator = np.random.default_rng(5)
    runs = [agreement(*generator.choice(["a", "b", "tie"], (2, 100)).tolist(), samples=400) for _ in range(100)]
    assert sum(run.low <= 0 <= run.high for run in runs) >= 88


def test_the_interval_is_that_of_drawing_questions():
    generator = np.random.default_rng(2)
    first = generator.choice(["a", "b"], 80)
    second = np.where(generator.uniform(size=80) < 0.3, generator.choice(["a", "b"], 80), first)
    draws = [generator.integers(0, 80, 80) for _ in range(2000)]
    kappas = [agreement(first[d].tolist(), second[d].tolist(), samples=1).kappa for d in draws]
    found = agreement(first.tolist(), second.tolist())
    np.testing.assert_allclose([found.low, found.high], np.percentile(kappas, [2.5, 97.5]), atol=0.03)


def test_agreement_is_seeded():
    one, two = winners(30, 20, 10), winners(20, 30, 10)
    assert agreement(one, two, seed=3) == agreement(one, two, seed=3)


def test_unscored_questions_are_left_out_and_ties_may_be():
    found = agreement(["a", "b", None, "tie"], ["a", None, "b", "a"])
    assert (found.num, found.table[0][0], found.table[2][0]) == (2, 1, 1)
    assert agreement(["a", "b", None, "tie"], ["a", None, "b", "a"], labels=("a", "b")).num == 1


def test_kappa_is_undefined_where_both_always_say_the_same():
    found = agreement(winners(8, 0), winners(8, 0))
    assert (found.share, found.kappa, found.low) == (1.0, None, None)
    assert agreement([], []).share is None
    assert all(x is None or not math.isnan(x) for x in found[3:])
