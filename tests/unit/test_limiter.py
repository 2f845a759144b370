"""The limiter's rules: who may leave, who pauses, what the budget allows, when all asking stops."""

import itertools

import pytest
from judge_clock import ASK, USED, most_in

from ray_jobs.judging.calls import Budget, Limits
from ray_jobs.judging.ledger import Spent
from ray_jobs.judging.limiter import DRIVER_SILENT_S, HORIZON_S, LONGEST_WAIT_S, SILENT_S, Limiter, Report
from ray_jobs.judging.pace import CATCH_UP


def granted(limiter, now, number=1):
    limiter.beat(now)
    return limiter.lease("c", [ASK] * number, [], now)


def proven(limits=None, budget=None, spent=None):
    limiter = Limiter(limits or Limits(requests_per_minute=600), budget, spent or Spent(), now=0.0)
    [grant] = granted(limiter, 0.0).grants
    limiter.lease("c", [], [Report("ok", ASK, grant, *USED, usd=0.004)], 0.1)
    return limiter


def test_a_refusal_pauses_everybody_once_an_episode():
    limiter = proven()
    grants = granted(limiter, 1.0, 10).grants
    refusals = [Report("refused", ASK, grant, wait_s=5.0) for grant in grants]
    assert len(grants) > 1
    assert limiter.lease("c", [ASK], refusals, 1.3).grants == ()
    assert granted(limiter, 5.0).grants == ()
    assert len(granted(limiter, 6.3).grants) == 1
    assert limiter.counters.rate_limited == len(grants)
    assert not limiter.stopped


def test_refusals_that_tell_nothing_wait_longer_each_time():
    limiter, now, waits = proven(), 1.0, []
    for _ in range(5):
        while not (lease := granted(limiter, now)).grants:
            now += 0.05
        refusal = Report("refused", ASK, lease.grants[0])
        limiter.lease("c", [], [refusal], now)
        began = now
        while not granted(limiter, now).grants:
            now += 0.05
        waits.append(now - began)
        now += 1.0
        limiter.lease("c", [], [Report("unsent", ASK, None)], now)
    assert waits[-1] > 2 * waits[0]


def test_an_absurd_wait_stops_and_can_be_resumed():
    limiter = proven()
    [grant] = granted(limiter, 1.0).grants
    lease = limiter.lease("c", [ASK], [Report("refused", ASK, grant, wait_s=LONGEST_WAIT_S + 1)], 1.1)
    assert "asks to wait 121 s" in lease.stopped and limiter.why == "pause"


def test_failures_do_not_slow_down():
    limiter = proven()
    for i in range(20):
        now = 1.0 + i * 0.2
        lease = granted(limiter, now)
        limiter.lease("c", [], [Report("failed", ASK, lease.grants[0], retry=True, error="500")], now + 0.1)
    grants = granted(limiter, 10.0, 10).grants
    assert len(grants) >= int(HORIZON_S * 9.7) and limiter.counters.retries == 20 and not limiter.stopped


def test_a_budget_of_calls_is_exact_and_finishes_what_is_in_flight():
    limiter = proven(budget=Budget(calls=5), spent=Spent(calls=2))  # one more was asked to prove the endpoint
    first = granted(limiter, 1.0, 10).grants
    assert len(first) == 2
    assert granted(limiter, 2.0).grants == () and not limiter.stopped
    done = [Report("ok", ASK, first[0], *USED), Report("failed", ASK, first[1])]
    assert len(limiter.lease("c", [ASK] * 5, done, 3.0).grants) == 1  # the failed one was not billed
    lease = limiter.lease("c", [ASK], [Report("failed", ASK, None, may_be_billed=True)], 4.0)
    assert "the budget of 5 calls is spent" in lease.stopped and limiter.why == "pause"


def test_a_budget_of_dollars_reserves_the_worst_and_pays_the_bill():
    limiter = proven(budget=Budget(usd=0.034), spent=Spent(usd=0.01))  # 0.014 with the first reply
    assert len(granted(limiter, 1.0, 10).grants) == 2  # 0.02 more at worst
    limiter.lease("c", [], [Report("ok", ASK, None, *USED, usd=0.004)] * 2, 2.0)  # it was 0.008
    assert len(granted(limiter, 3.0, 10).grants) == 1


def test_without_a_driver_nothing_is_granted():
    limiter = proven()
    assert granted(limiter, 1.0).grants
    silent = 1.0 + DRIVER_SILENT_S + 0.1
    assert limiter.lease("c", [ASK], [], silent).grants == ()
    assert granted(limiter, silent).grants


def test_what_a_dead_caller_held_counts_as_spent():
    limiter = proven(budget=Budget(calls=3))
    limiter.lease("dead", [ASK], [], 0.5)
    assert len(granted(limiter, 1.0, 10).grants) == 1
    later = 1.0 + SILENT_S
    limiter.beat(later)
    limiter.lease("c", [], [Report("failed", ASK, None)], later)
    assert len(granted(limiter, later + 1, 10).grants) == 1
    limiter.lease("c", [], [Report("ok", ASK, None, *USED)], later + 2)
    assert "budget" in granted(limiter, later + 3).stopped


def moments_of(limiter, now, until, number=50):
    """Return the moments that a caller is granted who asks every 50 ms."""
    moments = []
    while now < until:
        moments += [now + grant.delay_s for grant in granted(limiter, now, number).grants]
        now += 0.05
    return moments


def test_a_new_limiter_and_a_clock_that_slept_make_no_burst():
    limiter = proven()
    granted(limiter, 1.0, 50)
    moments = moments_of(limiter, 4000.0, 4005.0)
    assert 45 <= len(moments) and most_in(moments, 1.0) <= 10
    assert min(later - earlier for earlier, later in itertools.pairwise(moments)) >= 0.99 / (CATCH_UP * 0.97 * 10)
    assert len(granted(Limiter(Limits(requests_per_minute=600), None, Spent(), now=0.0), 0.0, 50).grants) == 1


def test_moments_that_go_back_are_given_again_within_the_limit():
    limiter = proven()
    first = granted(limiter, 2.0, 50).grants
    limiter.lease("c", [], [Report("unsent", ASK, grant) for grant in first], 2.2)
    again = moments_of(limiter, 2.2, 4.2)
    assert len(first) >= 3 and most_in(again, 1.0) <= 10
    assert len(again) == len(moments_of(proven(), 2.2, 4.2))  # as if none had been granted


def test_what_left_late_holds_back_what_follows():
    limiter = proven()
    moments = [2.0 + grant.delay_s for grant in granted(limiter, 2.0, 50).grants]
    limiter = proven()
    late = [Report("late", None, grant, late_s=0.3 - grant.delay_s) for grant in granted(limiter, 2.0, 50).grants]
    limiter.lease("c", [], late, 2.3)
    assert most_in([2.3] * len(moments) + moments_of(limiter, 2.3, 4.3), 1.0) <= 10


def test_a_refusal_moves_the_moments_by_what_it_tells_and_no_burst_follows():
    limiter = proven()
    moments_of(limiter, 1.0, 3.0)
    [grant] = granted(limiter, 3.3).grants
    limiter.lease("c", [], [Report("refused", ASK, grant, wait_s=5.0)], 3.4)
    after = moments_of(limiter, 3.45, 11.0)
    assert after[0] >= 8.4 and most_in(after, 1.0) <= 10


def test_one_refusal_of_a_told_limit_is_jitter_and_many_are_not():
    rates = []
    for every in (20, 5):
        limiter, now = proven(), 1.0
        for i in range(60):
            [grant] = granted(limiter, now).grants
            limiter.lease("c", [], [Report("ok" if i % every else "refused", ASK, grant, wait_s=0.0)], now + 0.1)
            now += 1.0
        moments = moments_of(limiter, now + 1.0, now + 11.0)
        rates.append((len(moments) - 1) / (moments[-1] - moments[0]))
    assert rates[0] >= 0.95 * 10 and rates[1] <= 0.93 * 10, rates


@pytest.mark.parametrize(("row", "stops"), [(False, True), (True, False)])
def test_an_endpoint_that_fails_call_after_call_stops_the_run(row, stops):
    limiter = proven()
    for i in range(10):
        [grant] = granted(limiter, 1.0 + i).grants
        limiter.lease("c", [], [Report("gave_up", ASK, grant, error="500", is_of_row=row)], 1.5 + i)
    assert bool(limiter.stopped) == stops and limiter.counters.unscored == 10


def test_nobody_there_is_known_after_one_call():
    limiter = Limiter(Limits(), None, Spent(), now=0.0)
    [grant] = granted(limiter, 0.0, 10).grants
    lease = limiter.lease("c", [ASK], [Report("gave_up", ASK, grant, error="refused", is_unreachable=True)], 20.0)
    assert lease.stopped == "refused" and limiter.why == "endpoint"
