"""Kappa and alpha against worked examples, plain loops and simulation."""

import math
from itertools import permutations

import numpy as np
import pytest

from ray_jobs.judging.agreement import agreement, jury_agreement, majority
from ray_jobs.judging.bootstrap import resampled_sums


def winners(a, b, ties=0, unscored=0):
    return ["a"] * a + ["b"] * b + ["tie"] * ties + [None] * unscored


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


def test_judges_that_never_disagree_have_an_interval_that_more_questions_narrow():
    lows = [agreement(winners(num, num), winners(num, num)).low for num in (2, 10, 200)]
    assert -1 <= lows[0] < 0 < lows[1] < lows[2] < 1
    assert jury_agreement([winners(2, 2)] * 3).low < 0.5 < jury_agreement([winners(100, 100)] * 3).low < 1
    # ten labels of one kind and one of the other: kappa is 1, and one label more could make it 0
    assert agreement(winners(10, 1), winners(10, 1)).low < 0


def test_a_judge_that_always_says_the_same_has_a_kappa_of_0_that_nothing_is_known_of():
    found = agreement(winners(99, 1), winners(100, 0))
    assert found.kappa == 0.0 and found.low < -0.5 and found.high > 0.5


def test_items_of_one_question_are_drawn_together():
    generator = np.random.default_rng(4)
    first, second = generator.choice(["a", "b"], (2, 30)).tolist()
    alone = agreement(first, second, seed=1)
    repeated = agreement(first * 9, second * 9, questions=list(range(30)) * 9, seed=1)
    assert (repeated.kappa, repeated.low, repeated.high) == pytest.approx((alone.kappa, alone.low, alone.high))
    assert agreement(first * 9, second * 9, seed=1).high < alone.high


def test_drawing_whole_questions_matches_drawing_them_one_by_one():
    values = np.random.default_rng(0).normal(size=(50, 2))
    sums = resampled_sums(values, seed=1, samples=4000)
    np.testing.assert_allclose(sums.mean(axis=0), values.sum(axis=0), atol=0.5)
    np.testing.assert_allclose(sums.std(axis=0), values.std(axis=0) * np.sqrt(50), rtol=0.05)
    np.testing.assert_array_equal(sums, resampled_sums(values[::-1], seed=1, samples=4000))


def alpha_by_hand(verdicts):
    """Krippendorff's definition: disagreement of pairs within questions over that of all pairs."""
    questions = [[x for x in said if x is not None] for said in zip(*verdicts, strict=True)]
    questions = [said for said in questions if len(said) > 1]
    everything = [x for said in questions for x in said]
    num = len(everything)
    within = sum(sum(x != y for x, y in permutations(said, 2)) / (len(said) - 1) for said in questions) / num
    between = sum(x != y for x, y in permutations(everything, 2)) / (num * (num - 1))
    return 1 - within / between


def test_alpha_follows_its_definition_with_missing_verdicts():
    generator = np.random.default_rng(6)
    truth = generator.choice(["a", "b", "tie"], 60)
    jury = [[t if generator.random() < 0.7 else generator.choice(["a", "b", None]) for t in truth] for _ in range(3)]
    found = jury_agreement(jury)
    assert found.alpha == pytest.approx(alpha_by_hand(jury))
    assert found.low < found.alpha < found.high


def test_alpha_of_krippendorffs_nominal_example():
    # Krippendorff 2011, section A: two observers, ten units, binary data
    one = ["a", "b", "a", "a", "a", "a", "a", "a", "b", "a"]
    two = ["b", "b", "b", "a", "a", "b", "a", "a", "a", "a"]
    assert jury_agreement([one, two]).alpha == pytest.approx(0.095, abs=5e-4)


def test_a_jury_without_disagreement_possible_has_no_alpha():
    assert jury_agreement([["a", "a"], ["a", "a"]]).alpha is None
    assert jury_agreement([["a", None], [None, "b"]]) == (None, None, None, 0)
    assert jury_agreement([]).num == 0


def test_the_majority_needs_more_than_half_of_those_who_said_something():
    assert majority(["a", "a", "b"]) == "a" and majority(["a", "b", None]) == "tie"
    assert majority(["b", None, None]) == "b" and majority([None]) is None
