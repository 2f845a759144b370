"""One, two and four callers on a simulated clock: as fast as a limit allows, and never faster."""

import random

import pytest
from judge_clock import USED, Provider, most_in, share_of_paced, simulate, utilisation

from ray_jobs.judging.calls import Limits


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


LIMITS = {
    "20 in 1 s": {"requests": 20, "window_s": 1.0},
    "7 in 1 s": {"requests": 7, "window_s": 1.0},
    "200 in 10 s": {"requests": 200, "window_s": 10.0},
    "1000 a minute": {"requests": 1000, "window_s": 60.0},
    "500 a minute, a bucket of 6 s": {"requests": 500, "window_s": 60.0, "bucket": 50},
}


@pytest.mark.parametrize(("num_callers", "gate_s", "latency_s"), [(1, 0.0, 0.3), (1, 0.003, 3.0), (2, 0.003, 0.3), (4, 0.003, 0.3)])
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(("stalls", "least"), [(None, 0.985), ((3.0, 0.25), 0.955)], ids=["quiet", "stalls"])
def test_what_callers_miss_is_made_up_for_and_no_limit_is_passed_by_it(limit, num_callers, gate_s, latency_s, stalls, least):
    provider = Provider(**limit, latency=lambda: latency_s, wait_s="exact", counts_refused=False)
    _, done = simulate(provider, num_calls=400, num_callers=num_callers, gate_s=gate_s, jitter_s=0.003, stalls=stalls)
    per_minute = limit["requests"] * 60 / limit["window_s"]
    assert share_of_paced([time - done[0] for time in done[1:]], per_minute, latency_s) >= least  # from the first reply on
    assert provider.refused <= 0.01 * 400


@pytest.mark.parametrize(("num_calls", "latency_s", "least"), [(200, 0.3, 0.96), (200, 3.0, 0.80), (2000, 3.0, 0.96)])
def test_what_the_first_call_costs_that_goes_alone(num_calls, latency_s, least):
    provider = Provider(requests=20, window_s=1.0, latency=lambda: latency_s)
    _, done = simulate(provider, num_calls=num_calls, gate_s=0.003, jitter_s=0.003)
    assert provider.refused == 0 and least <= share_of_paced(done, 1200, latency_s) <= least + 0.025


@pytest.mark.parametrize("stalls", [None, (3.0, 0.25)])
def test_a_bucket_too_small_for_catching_up_is_kept_evenly(stalls):
    provider = Provider(requests=20, window_s=1.0, bucket=2, wait_s="exact")
    _, done = simulate(provider, num_calls=600, jitter_s=0.003, stalls=stalls)
    assert share_of_paced(done, 1200, 0.3) >= (0.8 if stalls else 0.95)
    assert provider.refused <= 0.05 * 600


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
