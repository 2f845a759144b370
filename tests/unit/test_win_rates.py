"""Win rates, scores and exact tests against scipy, enumeration and simulation."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from ray_jobs.judging.rates import clustered_rate
from ray_jobs.judging.win_rates import preference, question_scores, sign_flip_test, win_rate


def winners(a, b, ties=0, unscored=0):
    return ["a"] * a + ["b"] * b + ["tie"] * ties + [None] * unscored


def test_the_known_result_44_to_56_is_not_significant():
    rate = win_rate(winners(44, 56))
    assert rate.p_value == pytest.approx(0.2713, abs=1e-4)
    assert (1 - rate.high, 1 - rate.low) == (pytest.approx(0.457, abs=1e-3), pytest.approx(0.659, abs=1e-3))


def test_the_known_result_66_to_34_is():
    rate = win_rate(winners(66, 34))
    assert rate.p_value == pytest.approx(0.0018, abs=1e-4)
    assert (rate.low, rate.high) == (pytest.approx(0.558, abs=1e-3), pytest.approx(0.752, abs=1e-3))


@pytest.mark.parametrize("num", [1, 5, 6, 12, 100, 101])
def test_the_interval_excludes_one_half_just_where_the_test_does(num):
    for wins in range(num + 1):
        rate = win_rate(winners(wins, num - wins))
        assert (rate.low <= 0.5 <= rate.high) == (rate.p_value >= 0.05), wins


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


def by_enumeration(differences):
    """Every sign flip, one by one."""
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    return float(np.mean([total >= abs(np.sum(differences)) - 1e-9 for total in sums]))


@pytest.mark.parametrize("parts", [(-1.0, 0.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0), (-1.0, -1 / 3, 1 / 3, 1.0)])
def test_sign_flips_are_all_of_them(parts):
    generator = np.random.default_rng(3)
    for _ in range(5):
        differences = generator.choice(parts, 11)
        assert sign_flip_test(differences) == pytest.approx(by_enumeration(differences))


def test_the_sign_flip_test_of_wins_and_losses_is_the_binomial_test():
    assert sign_flip_test([1] * 44 + [-1] * 56 + [0] * 30) == pytest.approx(win_rate(winners(44, 56)).p_value)
    assert sign_flip_test([0, 0]) == sign_flip_test([]) == 1.0


def test_the_sign_flip_test_is_quick_with_ten_thousand_questions_in_thirds():
    differences = np.random.default_rng(0).choice([-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1], 2000)
    by_normal = 2 * stats.norm.sf(abs(differences.sum()) / np.sqrt((differences**2).sum()))
    assert sign_flip_test(differences) == pytest.approx(by_normal, abs=0.01)


def test_the_sign_flip_test_holds_where_it_goes_by_fourier_transform():
    generator = np.random.default_rng(1)
    differences = generator.choice(np.arange(-60, 61), 6000, p=np.r_[np.full(60, 0.485), 0.02, np.full(60, 0.495)] / 58.82) / 60
    by_normal = 2 * stats.norm.sf((abs(differences.sum()) - 0.5 / 60) / np.sqrt((differences**2).sum()))
    assert 1e-4 < by_normal < 0.9
    assert sign_flip_test(differences) == pytest.approx(by_normal, rel=0.01)


def verdict(question_id, winner, *, swapped=False, repeat=0):
    row = {"question_id": question_id, "judge": "j", "model_a": "x", "model_b": "y", "swapped": swapped, "repeat": repeat}
    return {**row, "winner": winner}


def test_a_question_scores_the_mean_of_its_orders_however_often_each_was_asked():
    rows = [verdict("1", "a"), verdict("1", "a", repeat=1), verdict("1", "a", repeat=2), verdict("1", "b", swapped=True)]
    rows += [verdict("2", "tie"), verdict("2", "a", swapped=True)]
    assert question_scores(rows, "j", "x", "y") == {"1": 0.5, "2": 0.75}
    assert question_scores(rows, "other", "x", "y") == {}


def test_an_order_without_a_verdict_leaves_the_question_out_and_an_unscored_repeat_does_not():
    rows = [verdict("1", "a"), verdict("1", None, swapped=True), verdict("2", "a"), verdict("2", None, repeat=1)]
    assert question_scores(rows, "j", "x", "y") == {"2": 1.0}


def test_the_interval_counts_questions_and_not_games():
    scores = np.random.default_rng(1).choice([0.0, 1.0], 40)
    once = clustered_rate(scores, np.ones(40))
    ten_times = clustered_rate(10 * scores, 10 * np.ones(40))
    assert ten_times == pytest.approx(once)


def test_independent_wins_have_nearly_wilsons_interval():
    found = clustered_rate([1] * 60 + [0] * 40, np.ones(100))
    expected = stats.binomtest(60, 100).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=2e-3), pytest.approx(expected.high, abs=2e-3))


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_intervals_of_clustered_games_cover_the_rate(rate):
    """100 questions of four games, each question with a rate of its own: by game, the interval would be too narrow."""
    generator = np.random.default_rng(11)
    own = generator.beta(2 * rate, 2 * (1 - rate), size=(400, 100))
    won = generator.binomial(4, own)
    found = [clustered_rate(run, np.full(100, 4)) for run in won]
    assert np.mean([run.low <= rate <= run.high for run in found]) >= 0.93
    by_game = [stats.binomtest(int(run.sum()), 400).proportion_ci(method="wilson") for run in won]
    assert np.mean([run.low <= rate <= run.high for run in by_game]) < 0.9


def test_rates_at_their_ends_keep_an_interval():
    assert clustered_rate([2, 2, 2], [2, 2, 2]).high == 1.0 and 0 < clustered_rate([2, 2, 2], [2, 2, 2]).low < 1
    assert clustered_rate([0], [1]).value == 0.0 and clustered_rate([0], [1]).high < 1
    assert clustered_rate([], [])[:3] == clustered_rate([0], [0])[:3] == (None, None, None)


def test_a_preference_that_cannot_be_chance_excludes_one_half():
    few_wins = preference([1.0] * 10 + [0.5] * 90)
    assert few_wins.p_value == pytest.approx(2 / 2**10)
    assert 0.5 < few_wins.low < few_wins.score == 0.55 < few_wins.high
    assert preference([])[:4] == (None, None, None, None)
