"""The limiter on a simulated clock: one, two and four callers against a provider that counts every window."""

import heapq
import itertools
import random
from collections import deque

import pytest

from ray_jobs.judging.calls import Budget, Limits
from ray_jobs.judging.ledger import Spent
from ray_jobs.judging.limiter import DRIVER_SILENT_S, HORIZON_S, LONGEST_WAIT_S, SILENT_S, Ask, Limiter, Report

ASK = Ask(prompt_tokens=100, most_completion_tokens=800, usd=0.01)
USED = (100, 50)


class Provider:
    """Refuses what passes a sliding window; refused requests count too, as at OpenAI."""

    def __init__(self, *, requests=None, tokens=None, window_s=60.0, tells=True, latency=lambda: 0.3, wait_s=None):
        self.requests, self.tokens, self.window_s, self.tells, self.latency, self.wait_s = (
            requests,
            tokens,
            window_s,
            tells,
            latency,
            wait_s,
        )
        self.sent, self.refused, self._recent = [], 0, deque()

    def answer(self, now):
        """Return whether it is answered, after how long, and the headers."""
        while self._recent and self._recent[0] <= now - self.window_s + 1e-9:
            self._recent.popleft()
        self._recent.append(now)
        self.sent.append(now)
        over = self.requests is not None and len(self._recent) > self.requests
        over |= self.tokens is not None and len(self._recent) * sum(USED) > self.tokens
        self.refused += over
        per_minute = 60.0 / self.window_s
        told = {
            "requests_per_minute": self.requests * per_minute if self.requests and self.tells else None,
            "tokens_per_minute": self.tokens * per_minute if self.tokens and self.tells else None,
        }
        return not over, 0.02 if over else self.latency(), told


def simulate(provider, *, num_calls, num_callers=1, window=256, limits=None, until_s=3600.0, at=()):
    """Play callers that ask every 50 ms; return the limiter and the times of replies. `at` are (time, action)."""
    limiter = Limiter(limits or Limits(), None, Spent(), now=0.0)
    todo, done, order = num_calls, [], itertools.count()
    free, reports = [window // num_callers] * num_callers, [[] for _ in range(num_callers)]
    paused = [-1] * num_callers
    events = [(0.001 * i, next(order), "tick", i, None) for i in range(num_callers)]
    events += [(time, next(order), "do", 0, action) for time, action in at]
    heapq.heapify(events)
    while events and len(done) < num_calls:
        now, _, kind, i, what = heapq.heappop(events)
        assert now < until_s, f"{len(done)} of {num_calls} done, {limiter.counters}"
        if kind == "do":
            what()
        elif kind == "tick":
            limiter.beat(now)
            number = min(free[i], todo, 128)
            lease = limiter.lease(str(i), [ASK] * number, reports[i], now)
            reports[i] = []
            todo -= len(lease.grants)
            free[i] -= len(lease.grants)
            for grant in lease.grants:
                heapq.heappush(events, (now + grant.delay_s, next(order), "send", i, grant))
            if not lease.stopped:
                heapq.heappush(events, (now + max(0.05, min(lease.wait_s, 1.0)), next(order), "tick", i, None))
        elif kind == "send":
            if what.episode <= paused[i]:
                reports[i].append(Report("unsent", ASK, what))
                todo, free[i] = todo + 1, free[i] + 1
                continue
            ok, after, told = provider.answer(now)
            report = Report("ok", ASK, what, *USED, **told) if ok else Report("refused", ASK, what, wait_s=provider.wait_s)
            heapq.heappush(events, (now + after, next(order), "reply", i, report))
        else:
            reports[i].append(what)
            free[i] += 1
            if what.result == "ok":
                done.append(now)
            else:
                todo += 1
                paused[i] = max(paused[i], what.grant.episode)
    for i in range(num_callers):
        limiter.lease(str(i), [], reports[i], now)
    return limiter, done


def most_in(times, window_s):
    first, most = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - window_s + 1e-9:
            first += 1
        most = max(most, last - first + 1)
    return most


def utilisation(provider, per_minute, *, after_s=1.0):
    """Share of the limit between the first second and the last send."""
    times = [time for time in provider.sent if time >= after_s]
    return (len(times) - 1) / (times[-1] - times[0]) * 60 / per_minute


@pytest.mark.parametrize("num_callers", [1, 2, 4])
@pytest.mark.parametrize(("requests", "window_s"), [(500, 60.0), (20, 1.0), (10, 1.0)])
@pytest.mark.parametrize("latency_s", [0.3, 3.0])
def test_a_told_limit_is_used_and_never_passed(num_callers, requests, window_s, latency_s):
    draw = random.Random(1)
    provider = Provider(requests=requests, window_s=window_s, latency=lambda: latency_s * draw.lognormvariate(0, 0.5))
    limiter, done = simulate(provider, num_calls=800, num_callers=num_callers)
    assert len(done) == 800 and provider.refused == 0
    assert most_in(provider.sent, window_s) <= requests
    assert utilisation(provider, requests * 60 / window_s, after_s=2 * latency_s + 1) >= 0.95
    assert limiter.counters.ok == 800 and limiter.counters.prompt_tokens == 80_000


@pytest.mark.parametrize("num_callers", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "window_s"), [(30_000, 60.0), (3_000, 1.0)])
def test_tokens_are_limited_too_and_estimates_are_corrected(num_callers, tokens, window_s):
    provider = Provider(tokens=tokens, requests=100_000, window_s=window_s)
    simulate(provider, num_calls=600, num_callers=num_callers)
    assert provider.refused == 0 and most_in(provider.sent, window_s) * sum(USED) <= tokens
    assert utilisation(provider, tokens / sum(USED) * 60 / window_s) >= 0.93  # a window of 20 calls cannot hold 19.4


def test_a_configured_limit_paces_from_the_first_call_on():
    provider = Provider(requests=20, window_s=1.0, tells=False)
    simulate(provider, num_calls=300, limits=Limits(requests_per_minute=1200))
    assert provider.refused == 0 and utilisation(provider, 1200) >= 0.95


def test_the_first_call_goes_alone():
    provider = Provider(requests=1000, window_s=1.0, latency=lambda: 5.0)
    simulate(provider, num_calls=100, num_callers=4)
    assert [time for time in provider.sent if time < 5.0] == provider.sent[:1]


@pytest.mark.parametrize("tells", [True, False])
def test_a_limit_halved_in_mid_run_is_found_again(tells):
    provider = Provider(requests=40, window_s=1.0, tells=tells, wait_s=0.2)
    limits = Limits(requests_per_minute=None if tells else 2400)

    def halve():
        provider.requests = 20

    _, done = simulate(provider, num_calls=1500, limits=limits, at=[(10.0, halve)])
    late = [time for time in done if time > 25.0]
    assert (len(late) - 1) / (late[-1] - late[0]) >= 0.85 * 20
    assert provider.refused <= 0.05 * 1500


def test_replies_that_take_ten_times_as_long_do_not_change_the_pace():
    latency = [1.0]
    provider = Provider(requests=20, window_s=1.0, latency=lambda: latency[0])
    simulate(provider, num_calls=800, at=[(15.0, lambda: latency.__setitem__(0, 10.0))])
    assert provider.refused == 0 and utilisation(provider, 1200, after_s=2) >= 0.95


@pytest.mark.parametrize("num_callers", [1, 4])
@pytest.mark.parametrize(("requests", "window_s"), [(20, 1.0), (50, 1.0)])
def test_an_unknown_limit_is_felt_for(num_callers, requests, window_s):
    provider = Provider(requests=requests, window_s=window_s, tells=False)
    _, done = simulate(provider, num_calls=3000, num_callers=num_callers)
    late = [time for time in done if time > 30.0]
    assert (len(late) - 1) / (late[-1] - late[0]) >= 0.85 * requests / window_s
    assert provider.refused <= 0.05 * 3000


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


def test_a_new_limiter_and_a_clock_that_slept_make_no_burst():
    limiter = proven()
    granted(limiter, 1.0, 50)
    limiter.beat(4000.0)
    assert len(limiter.lease("c", [ASK] * 50, [], 4000.0).grants) <= 1 + HORIZON_S * 10
    assert len(granted(Limiter(Limits(requests_per_minute=600), None, Spent(), now=0.0), 0.0, 50).grants) == 1


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
