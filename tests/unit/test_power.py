"""Questions needed, against the exact binomial distribution."""

import pytest
from scipy import stats

from ray_jobs.judging.power import exact_power, questions_needed, smallest_visible_rate


@pytest.mark.parametrize(("rate", "num"), [(0.56, 543), (0.60, 194), (0.65, 85), (0.44, 543)])
def test_questions_needed(rate, num):
    assert questions_needed(rate) == num


def test_questions_needed_gives_the_power():
    num = questions_needed(0.6)
    critical = stats.binom.isf(0.025, num, 0.5)
    assert stats.binom.sf(critical - 1, num, 0.6) == pytest.approx(0.8, abs=0.03)
    assert questions_needed(0.5) is None


def test_ties_ask_for_more_questions():
    assert questions_needed(0.6, decided_share=0.5) == pytest.approx(2 * questions_needed(0.6), abs=1)
    assert questions_needed(0.6, decided_share=0.0) is None


def test_exact_power_counts_the_outcomes_that_the_test_shows():
    for num, rate in ((6, 0.8), (20, 0.7), (101, 0.6)):
        shown = [wins for wins in range(num + 1) if stats.binomtest(wins, num).pvalue < 0.05]
        assert exact_power(num, rate) == pytest.approx(stats.binom.pmf(shown, num, rate).sum())


def test_the_smallest_visible_rate_is_seen_four_times_in_five():
    assert exact_power(100, smallest_visible_rate(100)) == pytest.approx(0.8, abs=0.01)
    assert smallest_visible_rate(5) is None
