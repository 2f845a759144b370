"""The stub of the judge benchmarks keeps the limits it is given, bills what it lets in, and the tables say what the runs were."""

import json
import sys
import urllib.error
import urllib.request

import pytest

from benchmarks import judge, judge_kill
from benchmarks.judge_limits import Bucket, Window, most_in_window
from benchmarks.judge_runs import prove_fast_enough, run_contestant, running_stub
from benchmarks.judge_systems import prompts, request


@pytest.fixture(scope="module")
def stub():
    with running_stub() as found:
        yield found


def call(stub, prompt):
    """Status, body and headers of one call."""
    body = json.dumps(request(prompt)).encode()
    sent = urllib.request.Request(f"{stub.url}/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=30) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal), refusal.headers


def greedy(limit, amount, *, until, step=1 / 64):
    """Times at which a client that always asks again gets in."""
    times = [tick * step for tick in range(round(until / step))]
    found = []
    for now in times:
        if limit.wait_s(now, amount) <= 0:
            limit.take(now, amount)
            found.append(now)
    return found


def test_a_window_never_lets_in_more_than_its_share_wherever_it_is_laid():
    found = greedy(Window(1200, 1.0), 1, until=5)
    assert len(found) == 100 and most_in_window(found, 1.0) == 20


def test_a_bucket_lets_in_what_it_holds_and_then_the_rate():
    found = greedy(Bucket(600, 6.0), 1, until=10)
    assert len(found) == pytest.approx(60 + 100, abs=1)
    assert sum(at >= 5 for at in found) == pytest.approx(50, abs=1)


@pytest.mark.parametrize("limit", [Window(600, 1.0), Bucket(600, 1.0)])
def test_who_waits_as_told_gets_in_and_who_comes_earlier_does_not(limit):
    for _ in range(10):
        limit.take(0.0, 1)
    wait_s = limit.wait_s(0.5, 8)
    assert wait_s > 0 and limit.wait_s(0.5 + wait_s - 0.01, 8) > 0 and limit.wait_s(0.5 + wait_s + 0.01, 8) == 0


@pytest.mark.parametrize("limit", [Window(60, 1.0), Bucket(60, 1.0)])
def test_a_call_larger_than_the_limit_holds_passes_once_nothing_else_does(limit):
    assert limit.wait_s(0.0, 50) == 0


def test_most_in_a_window_is_that_of_counting_by_hand():
    times = [0.0, 0.1, 0.2, 0.95, 1.0, 1.05, 2.5]
    by_hand = max(sum(start <= at < start + 1.0 for at in times) for start in times)
    assert most_in_window(times, 1.0) == by_hand == 5


def test_the_bill_counts_a_prompt_asked_again_as_paid_twice_and_a_trial_call_not_at_all(stub):
    stub.begin({"latency_s": 0.0, "about": "Question "})
    first, second = prompts(2)
    verdicts = [call(stub, prompt)[1]["choices"][0]["message"]["content"] for prompt in (first, second, first)]
    assert call(stub, "hello")[0] == 200
    assert verdicts[0] == verdicts[2] and json.loads(verdicts[0])["winner"] in {"A", "B", "tie"}
    found = stub.stats()
    assert (found["billed"], found["distinct"], found["paid_twice"], found["replied"]) == (3, 2, 1, 3)


def test_a_refusal_says_when_to_come_back_and_costs_nothing(stub):
    stub.begin({"latency_s": 0.0, "requests_per_minute": 2, "span_s": 60.0})
    statuses = [call(stub, prompt)[0] for prompt in prompts(3)]
    status, body, headers = call(stub, "once more")
    assert statuses == [200, 200, 429] and status == 429 and body["error"]["code"] == "rate_limit_exceeded"
    assert 55 <= int(headers["retry-after"]) <= 60 and 55_000 <= int(headers["retry-after-ms"]) <= 60_000
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "0")
    found = stub.stats()
    assert (found["billed"], found["refused"], found["asked"]) == (2, 2, 4)


def test_headers_and_retry_after_can_be_missing(stub):
    stub.begin({"latency_s": 0.0, "requests_per_minute": 1, "span_s": 60.0, "headers": False, "retry_after": False})
    told = [call(stub, prompt)[2] for prompt in prompts(2)]
    assert not [name for headers in told for name in headers if name.startswith(("x-ratelimit", "retry-after"))]


def test_tokens_are_a_limit_of_their_own(stub):
    stub.begin({"latency_s": 0.0, "tokens_per_minute": 700, "enforced": "bucket", "span_s": 60.0})
    assert [call(stub, prompt)[0] for prompt in prompts(4)][-1] == 429
    assert 0 < stub.stats()["billed_tokens"] <= 710


@pytest.mark.parametrize(("counted", "later"), [(False, 0.0), (True, 1.0)])
def test_refused_calls_use_the_limit_up_where_the_provider_counts_them(stub, counted, later):
    stub.begin({"latency_s": 0.0, "requests_per_minute": 1, "span_s": 60.0, "rejected_count": counted, "enforced": "bucket"})
    waits = [int(call(stub, prompt)[2].get("retry-after-ms", 0)) for prompt in prompts(3)]
    assert waits[2] - waits[1] == pytest.approx(60_000 * later, abs=3_000)


def test_a_limit_changes_in_mid_run(stub):
    stub.begin({"latency_s": 0.0, "change_after": 2, "change": {"requests_per_minute": 1, "span_s": 60.0}})
    assert [call(stub, prompt)[0] for prompt in prompts(4)] == [200, 200, 200, 429]
    assert stub.stats()["changed_at"] is not None


def test_a_stub_that_is_too_slow_for_the_limit_is_refused(stub):
    assert prove_fast_enough(stub, 1.0, seconds=0.5) > 10
    with pytest.raises(SystemExit, match="less than 10 times"):
        prove_fast_enough(stub, 1e5, seconds=0.5)


def test_a_contestants_run_has_its_own_word_and_the_stubs(stub):
    cell = {"requests_per_minute": 6000, "latency_s": 0.05, "about": "Question "}
    told = {"system": "paced-0.97", "cell": "c", "requests_per_minute": 6000, "n": 20, "tokens_per_call": 347, "latency_s": 0.05}
    found = run_contestant(stub, cell, told, python=sys.executable, longest_s=60.0)
    assert (found["answered"], found["billed"], found["paid_twice"], found["finished"]) == (20, 20, 0, True)
    assert found["cpu_s"] > 0 and found["peak_bytes"] > 0 and judge.utilisation(found) > 0
    row = {**found, "test": "utilisation", "turn": "0", "callers": None}
    assert "| c | 20 | paced-0.97 | " in judge.utilisation_table([row])
    assert judge.goals([row, {**row, "system": "raystill"}]) == [
        "- c, 20 calls, raystill: 100% of paced-0.97, 0.0 429s per 100, 0 rows lost; aimed at: at least 95%, at most 5, 0; met"
    ]


@pytest.mark.parametrize(("limit", "share"), [({"requests_per_minute": 1200}, 0.5), ({"tokens_per_minute": 120_000}, 0.75)])
def test_from_the_first_reply_on_what_was_waited_for_does_not_count(limit, share):
    times = [0.0] + [3.0 + (i + 1) / 10 for i in range(100)]
    run = {"stub": limit, "first_reply_at": 3.0, "let_in_at": times, "tokens": [150] * 101}
    assert judge.steady(run) == pytest.approx(share)
    assert judge.steady({**run, "first_reply_at": 20.0}) is None


def test_recovery_is_counted_from_the_change_to_two_seconds_near_the_new_limit():
    before, slow, full = [i / 20 for i in range(100)], [5.0 + i for i in range(5)], [10.0 + i / 10 for i in range(40)]
    run = {"stub": {"requests_per_minute": 1200, "change": {"requests_per_minute": 600}}, "changed_at": 5.0}
    assert judge.recovery_s({**run, "let_in_at": before + slow + full}) == pytest.approx(5.0, abs=1.0)
    assert judge.recovery_s({**run, "let_in_at": before + slow}) is None


def test_the_tables_of_workers_and_kills_have_a_line_for_each_case():
    run = {"system": "s", "callers": 2, "most_asked_in_1s": 40, "most_let_in_in_1s": 20, "replied": 100, "refused": 50, "billed_tokens": 0}
    run |= {"stub": {"requests_per_minute": 1200}, "span_s": 10.0, "n": 100, "answered": 98, "finished": True}
    assert judge.callers_table([run]).splitlines()[-1] == "| s | 2 | 40 | 20 | 50 | 2 | 50 | 1 |"
    kills = [
        {"system": "s", "victim": victim, "share": 0.5, "billed": 103, "paid_twice": 3, "in_flight_at_kill": 4, "n": 100, "answered": 100}
        | {"billed_by_orphans": 0 if victim == "driver" else None}
        for victim in ("driver", "worker")
    ]
    assert judge_kill.table(kills).splitlines()[2:] == [
        "| s | driver | 50% | 103 | 3 | 4 | 0 | 0 | 1 |",
        "| s | worker | 50% | 103 | 3 | 4 | - | 0 | 1 |",
    ]
