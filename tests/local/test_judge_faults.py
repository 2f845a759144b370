"""Judge calls against an endpoint that fails: counters and replies are those of the run without faults, but for what the fault adds."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from judge_asks import NUM, OK, SECRET, SOON, USD, ask, calls_to, faultless, spent_on, winners, worst
from judge_server import Fault, JudgeServer, Window, completion, error, opinion
from pydantic import SecretStr

from ray_jobs.core.storage import Storage
from ray_jobs.judging import tries
from ray_jobs.judging.calls import Counters, EndpointOptions, Limits
from ray_jobs.judging.here import ask_here
from ray_jobs.judging.ledger import Ledger, Spent
from ray_jobs.judging.parse import read_completion, read_opinion


@pytest.fixture
def ledger(tmp_path):
    return Ledger(Storage(str(tmp_path / "replies")))


def repeated(requests):
    return [request for i, request in enumerate(requests) if request in requests[:i]]


def once(fault, at=(3, 4)):
    return lambda number, request: fault if number in at else None


def retry_after_date():
    return {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)}


@pytest.mark.parametrize(
    ("fault", "adds"),
    [
        pytest.param(None, {}, id="none"),
        pytest.param(Fault(429, error("slow down"), SOON), {"rate_limited": 2}, id="429-ms"),
        pytest.param(Fault(429, error("slow down"), {"Retry-After": "1"}), {"rate_limited": 2}, id="429-seconds"),
        pytest.param(Fault(429, error("slow down"), retry_after_date()), {"rate_limited": 2}, id="429-date"),
        pytest.param(Fault(429, error("slow down")), {"rate_limited": 2}, id="429-untold"),
        *(pytest.param(Fault(status, error("busy"), SOON), {"retries": 2}, id=str(status)) for status in (408, 409, 500, 502, 503, 529)),
        pytest.param(Fault(share=0.0), {"retries": 2, "possibly_paid_twice": 2}, id="reset"),
        pytest.param(Fault(body=completion("x" * 99), share=0.5), {"retries": 2, "possibly_paid_twice": 2}, id="mid-body"),
        pytest.param(Fault(delay_s=4.0), {"retries": 2, "possibly_paid_twice": 2}, id="timeout"),
        pytest.param(Fault(504, error("gateway"), SOON), {"retries": 2, "possibly_paid_twice": 2}, id="504"),
        pytest.param(Fault(body="<html>proxy</html>", headers=SOON), {"retries": 2}, id="proxy-page"),
        pytest.param(Fault(body=error("overloaded"), headers=SOON), {"retries": 2}, id="200-with-error"),
        pytest.param(Fault(body='{"error": {"message": "slow", "code": 429}}', headers=SOON), {"rate_limited": 2}, id="200-with-429"),
        pytest.param(Fault(body='{"choices": []}', headers=SOON), {"retries": 2}, id="no-choices"),
        pytest.param(Fault(body='{"choices": ', headers=SOON), {"retries": 2}, id="torn-json"),
    ],
)
def test_what_passes_leaves_the_replies_of_a_run_without_faults(ledger, fault, adds):
    with JudgeServer(once(fault) if fault else lambda number, request: None).running() as server:
        replies, asked = ask(server.url, ledger, timeout_s=3.0 if fault and fault.delay_s else 30.0)
    assert winners(replies) == faultless()
    again = adds.get("retries", 0) + adds.get("rate_limited", 0)
    assert asked.counters == OK._replace(sent=NUM + again, **adds) and not asked.stopped
    assert len(server.requests) == NUM + again
    doubtful = [worst(request) for request in repeated(server.requests)] if "possibly_paid_twice" in adds else []
    spent = ledger.spent()
    assert spent.calls == NUM + len(doubtful) and spent.usd == pytest.approx(NUM * USD + sum(doubtful))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_text_that_is_refused_is_one_unscored_row_sent_once(ledger, status):
    with JudgeServer(once(Fault(status, error("maximum context length", "context_length_exceeded")), at=(5,))).running() as server:
        replies, asked = ask(server.url, ledger)
    assert len(server.requests) == NUM and not asked.stopped
    assert asked.counters == OK._replace(
        ok=NUM - 1, unscored=1, prompt_tokens=100 * (NUM - 1), completion_tokens=50 * (NUM - 1), usd=pytest.approx((NUM - 1) * USD)
    )
    [failed] = [reply for reply in replies if reply.error]
    assert f"{status} - maximum context length" in failed.error and not failed.may_pass


def test_a_row_that_fails_for_good_does_not_fail_the_others_and_is_asked_again_next_time(ledger):
    def fails(_, request):
        return Fault(500, error("broken"), SOON) if "\nxx\n<" in request["messages"][0]["content"] else None

    with JudgeServer(fails).running() as server:
        replies, asked = ask(server.url, ledger, max_retries=2)
        assert [bool(reply.error) for reply in replies] == [reply.may_pass for reply in replies] == [i == 2 for i in range(NUM)]
        assert asked.counters.retries == 2 and asked.counters.unscored == 1 and not asked.stopped
        server.fault = lambda number, request: None
        before = len(server.requests)
        replies, asked = ask(server.url, ledger)
    assert len(server.requests) == before + 1 and winners(replies) == faultless()


@pytest.mark.parametrize(("status", "code"), [(401, "invalid_api_key"), (403, None), (404, "model_not_found"), (429, "insufficient_quota")])
def test_a_refusal_of_all_calls_stops_after_one(ledger, tmp_path, status, code):
    with JudgeServer(lambda number, _: Fault(status, error(f"key {SECRET} refused", code), SOON)).running() as server:
        replies, asked = ask(server.url, ledger)
    assert len(server.requests) == 1 and asked.why == "endpoint" and ledger.spent() == Spent()
    assert "refused" in asked.stopped and SECRET not in asked.stopped
    assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*.json"))
    assert replies.count(None) == NUM - 1


def test_a_text_that_moderation_refuses_stops_nothing_though_it_is_asked_first(ledger):
    flagged = Fault(403, error("your input was flagged", "moderation"))
    with JudgeServer(lambda number, _: flagged if number == 1 else None).running() as server:
        replies, asked = ask(server.url, ledger)
    assert not asked.stopped and asked.counters.ok == NUM - 1 and sum("flagged" in reply.error for reply in replies) == 1
    assert ledger.spent() == spent_on(NUM - 1)


def test_credit_that_ends_in_mid_run_keeps_what_was_answered(ledger):
    quota = Fault(429, error("no credit", "insufficient_quota"))
    with JudgeServer(lambda number, _: quota if number > 5 else None).running() as server:
        replies, asked = ask(server.url, ledger, limits=Limits(requests_per_minute=12000, max_concurrency=2))
        assert asked.why == "endpoint" and asked.counters.ok == 5 and 6 <= len(server.requests) <= 7
        server.fault = lambda number, request: None
        before = len(server.requests)
        replies, asked = ask(server.url, ledger)
    assert winners(replies) == faultless() and len(server.requests) == before + NUM - 5


def test_an_absurd_wait_pauses_the_run_which_then_goes_on(ledger):
    with JudgeServer(once(Fault(429, error("tomorrow"), {"Retry-After": "3600"}), at=(4,))).running() as server:
        _, asked = ask(server.url, ledger, limits=Limits(requests_per_minute=12000, max_concurrency=1))
        assert asked.why == "pause" and "3600 s" in asked.stopped and len(server.requests) == 4
        assert ledger.spent().calls == 3
        replies, asked = ask(server.url, ledger)
    assert winners(replies) == faultless() and len(server.requests) == NUM + 1 and asked.counters.possibly_paid_twice == 0


def test_nobody_there_is_said_after_one_call_and_waited_for_when_it_answered_before(ledger, free_port):
    class Nobody:
        url = f"http://127.0.0.1:{free_port}/v1"

    _, asked = ask(Nobody.url, ledger, max_retries=1)
    assert asked.why == "endpoint" and "Connection error" in asked.stopped and asked.counters.sent == 2
    server = JudgeServer(latency_s=0.02)
    calls = calls_to(server.url)

    def gone_for_a_while():
        with server.running():
            while len(server.requests) < 4:
                time.sleep(0.005)
        time.sleep(1.0)
        with JudgeServer(port=int(server.url.split(":")[2].split("/")[0])).running() as again:
            while len(again.requests) + 4 < NUM and not ended.wait(0.01):
                pass

    ended, thread = threading.Event(), threading.Thread(target=gone_for_a_while)
    thread.start()
    replies, asked = ask(server.url, ledger, calls=calls, limits=Limits(requests_per_minute=12000, max_concurrency=2))
    ended.set()
    thread.join()
    assert winners(replies) == faultless() and asked.counters.unscored == 0


def test_a_reply_that_is_cut_is_asked_for_once_more_with_more_room_and_both_are_billed(ledger):
    def cut(_, request):
        return Fault(body=completion('{"reasoning": "cut', finish_reason="length")) if request["max_tokens"] < 200 else None

    with JudgeServer(cut).running() as server:
        [reply], asked = ask(server.url, ledger, calls=calls_to(server.url, 1))
        assert winners([reply]) == ["B"] and [request["max_tokens"] for request in server.requests] == [100, 200]
        assert (reply.prompt_tokens, reply.completion_tokens) == (200, 100)
        assert asked.counters == Counters(sent=2, ok=1, prompt_tokens=200, completion_tokens=100, retries=1, usd=pytest.approx(400e-6))
        server.fault = lambda *_: Fault(body=completion("never ends", finish_reason="length"))
        [still], asked = ask(server.url, ledger, calls=calls_to(server.url, 2)[1:])
    assert json.loads(still.body)["choices"][0]["finish_reason"] == "length" and len(server.requests) == 4
    assert ledger.spent().calls == 4 and ledger.spent().prompt_tokens == 400


def test_a_reply_that_is_cut_is_kept_where_a_longer_one_is_refused(ledger):
    def cut(_, request):
        is_long = request["max_tokens"] > 100
        return Fault(400, error("max_tokens is too large")) if is_long else Fault(body=completion("cut", finish_reason="length"))

    with JudgeServer(cut).running() as server:
        for counters in (Counters(sent=2, unscored=1, prompt_tokens=100, completion_tokens=50, retries=1, usd=USD), Counters(usd=0.0)):
            [reply], asked = ask(server.url, ledger, calls=calls_to(server.url, 1))
            assert json.loads(reply.body)["choices"][0]["finish_reason"] == "length" and asked.counters == counters
    assert len(server.requests) == 2 and ledger.spent() == spent_on(1)


@pytest.mark.parametrize("choices", ["[]", '[{"index": 0, "finish_reason": "content_filter"}]', '[{"message": null}]'])
def test_a_billed_reply_that_holds_nothing_is_asked_for_once_more_and_no_further(ledger, choices):
    body = f'{{"choices": {choices}, "usage": {{"prompt_tokens": 100, "completion_tokens": 50}}}}'
    with JudgeServer(lambda *_: Fault(body=body, headers=SOON)).running() as server:
        [reply], asked = ask(server.url, ledger, calls=calls_to(server.url, 1))
    assert reply.error and len(server.requests) == 2 == ledger.spent().calls
    assert asked.counters == Counters(sent=2, unscored=1, prompt_tokens=200, completion_tokens=100, retries=1, usd=pytest.approx(400e-6))


@pytest.mark.parametrize(
    "body", ['{"choices": [], "usage": {"prompt_tokens": Infinity}}', "[" * 100_000, '{"choices": [{"message": {"content": 7}}]}']
)
def test_no_reply_breaks_the_run(ledger, body):
    with JudgeServer(once(Fault(body=body, headers=SOON), at=(3,))).running() as server:
        replies, asked = ask(server.url, ledger)
    assert all(replies) and asked.counters.ok == NUM


@pytest.mark.parametrize("padding", range(200, 300, 7))
def test_no_part_of_the_key_stays_where_a_message_is_cut(ledger, padding):
    key = "sk-" + "k" * 60
    endpoint = EndpointOptions(SecretStr(key), timeout_s=5.0, max_retries=0)
    with JudgeServer(lambda *_: Fault(401, error("x" * padding + f" {key} refused", "invalid_api_key"))).running() as server:
        asked = ask_here(calls_to(server.url, 1), endpoint=endpoint._replace(base_url=server.url), ledger=ledger, limits=Limits())
    assert asked.stopped and "kkk" not in asked.stopped


def test_tokens_that_are_not_told_are_counted_and_said_to_be(ledger):
    body = json.dumps({"model": "stub-1", "choices": [{"message": {"content": opinion("A")}, "finish_reason": "stop"}]})
    with JudgeServer(lambda *_: Fault(body=body)).running() as server:
        [reply], asked = ask(server.url, ledger, calls=calls_to(server.url, 1))
    assert reply.is_estimated and asked.counters.estimated == 1
    assert reply.prompt_tokens > 5 and reply.completion_tokens == len(opinion("A")) // 4 + 1 and reply.usd > 0


def test_a_limit_is_kept_from_its_headers_alone(ledger):
    with JudgeServer(window=Window(20), latency_s=0.1).running() as server:
        replies, asked = ask(server.url, ledger, calls=calls_to(server.url, 60), limits=Limits())
    assert asked.counters.ok == 60 and all(replies)
    assert server.num_refused == asked.counters.rate_limited < 15  # late on a busy machine; benchmarks/JUDGE.md has the figures


def test_no_more_calls_are_in_flight_than_allowed_and_a_slow_one_holds_back_none(ledger):
    slow = Fault(body=completion(opinion("A")), delay_s=1.0)
    with JudgeServer(once(slow, at=(2,)), latency_s=0.02).running() as server:
        replies, _ = ask(server.url, ledger, calls=calls_to(server.url, 40), limits=Limits(requests_per_minute=12000, max_concurrency=3))
    assert all(replies) and server.most_in_flight == 3
    assert sum(server.times[1] < at < server.times[1] + 1.0 for at in server.times) >= 3, "others went on beside the slow one"


def test_a_call_that_is_refused_again_and_again_is_given_up(ledger):
    def too_large(_, request):
        return (
            Fault(429, error("larger than the limit"), {"retry-after-ms": "1"}) if "\nxx\n<" in request["messages"][0]["content"] else None
        )

    with JudgeServer(too_large).running() as server:
        replies, asked = ask(server.url, ledger)
    assert [bool(reply.error) for reply in replies] == [i == 2 for i in range(NUM)]
    assert len(server.requests) == NUM + tries.MOST_REFUSALS and asked.counters.unscored == 1


def test_a_reply_that_is_hard_to_read_is_kept_as_it_came_and_repaired_by_no_further_call(ledger):
    texts = {
        2: f"```json\n{opinion('A')}\n```",
        3: f"They wrote {opinion('B')}, but I say {opinion('A')}",
        4: f"{opinion('tie')}\nI hope this helps {{",
        5: '{"reasoning": "x", "winner": "A" "B"}',
    }

    def says(_, request):
        text = texts.get(request["messages"][0]["content"].count("x") - 4)
        return Fault(body=completion(text)) if text else None

    with JudgeServer(says).running() as server:
        for _ in range(2):
            replies, asked = ask(server.url, ledger)
    opinions = [read_opinion(read_completion(reply.body).text, swapped=False) for reply in replies]
    assert [found.winner for found in opinions[:6]] == ["b", "b", "a", "a", "tie", None]
    assert "no verdict in the reply" in opinions[5].unscored
    assert [read_completion(replies[number].body).text for number in texts] == list(texts.values())
    assert len(server.requests) == NUM and asked.counters.sent == 0
