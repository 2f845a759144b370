"""Questions needed, against the power of the exact test."""

import numpy as np
import pytest
from scipy import stats

from ray_jobs.judging.power import questions_needed


def exact_power(num, rate):
    """The chance that the exact test of so many questions has p below 0.05."""
    wins = np.arange(num + 1)
    p_values = 2 * np.minimum(stats.binom.cdf(wins, num, 0.5), stats.binom.sf(wins - 1, num, 0.5))
    return stats.binom.pmf(wins[p_values < 0.05], num, rate).sum()


@pytest.mark.parametrize(("rate", "num"), [(0.56, 560), (0.60, 204), (0.65, 92), (0.44, 560)])
def test_questions_needed(rate, num):
    assert questions_needed(rate) == num


@pytest.mark.parametrize("rate", [0.56, 0.6, 0.65, 0.7, 0.8, 0.95, 0.2])
def test_so_many_questions_give_the_exact_test_its_power_and_a_sixth_fewer_do_not(rate):
    num = questions_needed(rate)
    assert exact_power(num, rate) >= 0.799
    assert exact_power(num * 5 // 6, rate) < 0.8
    assert questions_needed(0.5) is None


def test_even_a_model_that_always_wins_needs_six_questions():
    assert questions_needed(1.0) == questions_needed(0.0) == 6
    assert stats.binomtest(5, 5).pvalue > 0.05 > stats.binomtest(6, 6).pvalue


def test_ties_ask_for_more_questions():
    assert questions_needed(0.6, decided_share=0.5) == pytest.approx(2 * questions_needed(0.6), abs=1)
    assert questions_needed(0.6, decided_share=0.0) is None
