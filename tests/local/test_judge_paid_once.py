"""What a call to a judge has cost is kept and counted: budgets, disks that fill, drivers that are killed or interrupted."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_asks import NUM, OK, PRICES, SECRET, USD, ask, calls_to, faultless, spent_on, winners, worst
from judge_server import Fault, JudgeServer, completion, error, opinion
from pydantic import SecretStr

from ray_jobs.core.errors import StorageError
from ray_jobs.core.storage import Storage
from ray_jobs.judging.caller import Caller, LocalGate
from ray_jobs.judging.calls import Budget, Counters, EndpointOptions, Limits, Reply
from ray_jobs.judging.here import ask_here
from ray_jobs.judging.ledger import Intent, Ledger, Spent
from ray_jobs.judging.limiter import Grant, Lease, Limiter
from ray_jobs.judging.parse import read_completion

DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background of a script ignores it
sys.path.insert(0, sys.argv[3])
from judge_asks import ask
from ray_jobs.core.storage import Storage
from ray_jobs.judging.calls import Limits
from ray_jobs.judging.ledger import Ledger
ask(sys.argv[1], Ledger(Storage(sys.argv[2])), limits=Limits(requests_per_minute=1200, max_concurrency=3))
"""


@pytest.fixture
def ledger(tmp_path):
    return Ledger(Storage(str(tmp_path / "replies")))


def test_an_interrupt_keeps_what_is_in_flight(ledger):
    with JudgeServer(latency_s=0.3).running() as server:
        command = [sys.executable, "-c", DRIVER, server.url, ledger.folder.uri, str(Path(__file__).parents[1])]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
            while len(server.requests) < NUM // 2:
                time.sleep(0.01)
            driver.send_signal(signal.SIGINT)
            _, said = driver.communicate()
        assert driver.returncode == -signal.SIGINT and "KeyboardInterrupt" in said
        assert len(server.requests) < NUM and ledger.spent() == spent_on(len(server.requests))
        replies, asked = ask(server.url, ledger)
    assert len(server.requests) == NUM and winners(replies) == faultless() and not asked.counters.possibly_paid_twice


def test_a_budget_stops_finishes_what_is_in_flight_and_holds_over_restarts(ledger):
    with JudgeServer(latency_s=0.02).running() as server:
        for number in (5, 5, 8):

            def limiter(number=number):
                return Limiter(Limits(requests_per_minute=12000), Budget(calls=number), ledger.spent(), now=time.monotonic())

            replies, asked = ask(server.url, ledger, limiter=limiter())
            assert len(server.requests) == number == sum(reply is not None for reply in replies)
            assert "budget" in asked.stopped and asked.why == "pause"
        dollars = Limiter(Limits(requests_per_minute=12000), Budget(usd=0.0025), ledger.spent(), now=time.monotonic())
        ask(server.url, ledger, limiter=dollars)
    assert 8 < len(server.requests) < NUM and ledger.spent().usd <= 0.0025


def test_a_full_disk_stops_before_the_next_call_is_paid(tmp_path):
    ledger = Ledger(Storage(str(tmp_path / "replies")))

    def fill(number, request):
        if number == 3:  # from here on nothing can be written: a file stands where the folders were
            (tmp_path / "replies").rename(tmp_path / "moved")
            (tmp_path / "replies").write_text("")

    with JudgeServer(fill).running() as server:
        replies, asked = ask(server.url, ledger, limits=Limits(requests_per_minute=12000, max_concurrency=1))
    assert asked.why == "storage" and "cannot be" in asked.stopped
    assert len(server.requests) == 3 and sum(reply is not None for reply in replies) == 3


def test_an_intent_without_a_reply_is_asked_again_and_counted(ledger):
    with JudgeServer().running() as server:
        calls = calls_to(server.url)
        most = worst(calls[4].request)
        ledger.intend(calls[4].key, Intent(1, usd=most))
        _, asked = ask(server.url, ledger, calls=calls)
    assert asked.counters == OK._replace(possibly_paid_twice=1)
    assert ledger.spent().calls == NUM + 1 and ledger.spent().usd == pytest.approx(NUM * USD + most)


def test_a_budget_in_dollars_holds_over_drivers_that_were_killed(ledger):
    with JudgeServer().running() as server:
        calls = calls_to(server.url, 6)
        most = [worst(call.request) for call in calls]
        budget = Budget(usd=6 * max(most))
        for call, usd in zip(calls[:4], most[:4], strict=True):  # each was sent and maybe billed, and its sender killed
            ledger.intend(call.key, Intent(1, usd=usd))
        for _ in range(2):
            limiter = Limiter(Limits(requests_per_minute=12000), budget, ledger.spent(), now=time.monotonic())
            _, asked = ask(server.url, ledger, calls=calls, limiter=limiter)
    assert "budget" in asked.stopped and server.requests
    assert sum(most[:4]) + USD * len(server.requests) <= budget.usd


def test_what_is_answered_is_not_asked_again_and_no_calls_is_no_work(ledger):
    with JudgeServer().running() as server:
        ask(server.url, ledger)
        replies, asked = ask(server.url, ledger)
        assert winners(replies) == faultless() and asked.counters.sent == 0
        assert ask(server.url, ledger, calls=[])[1].counters == Counters(usd=0.0)
    assert len(server.requests) == NUM and set(server.keys) == {f"Bearer {SECRET}"}
    assert ledger.spent() == spent_on(NUM)


class FailingLedger(Ledger):
    """One whose storage cannot be reached when the first replies are to be kept."""

    def __init__(self, folder, num_failures):
        super().__init__(folder)
        self.num_failures = num_failures

    def keep(self, key, reply):
        if self.num_failures:
            self.num_failures -= 1
            raise StorageError("cannot be reached")
        super().keep(key, reply)


def test_a_storage_that_fails_for_a_moment_loses_no_reply(ledger):
    with JudgeServer().running() as server:
        replies, asked = ask(server.url, FailingLedger(ledger.folder, 2))
        assert winners(replies) == faultless() and asked.counters == OK and not asked.stopped
        more = calls_to(server.url, NUM + 1)[NUM:]
        _, asked = ask(server.url, FailingLedger(ledger.folder, 3), calls=more)
    assert asked.why == "storage" and "cannot be reached" in asked.stopped
    assert len(server.requests) == NUM + 1 and ledger.spent().unanswered == 1


def test_a_call_that_another_process_has_answered_meanwhile_is_counted_and_its_first_reply_stays(ledger):
    theirs = Reply(completion(opinion("tie")), 0.1, "", 100, 50, False, "stub-1", USD)

    def another(number, request):
        if number == 1:
            ledger.intend(calls[0].key, Intent(1))
            ledger.keep(calls[0].key, theirs)

    server = JudgeServer(another)
    calls = calls_to(server.url)
    with server.running():
        replies, asked = ask(server.url, ledger)
    assert winners(replies) == ["tie", *faultless()[1:]] and asked.counters == OK._replace(paid_twice=1)
    assert ledger.spent() == spent_on(NUM + 1)


def test_an_error_of_who_takes_the_replies_ends_the_calls_and_loses_none(ledger):
    def take(call, reply):
        raise ValueError("not taken")

    endpoint = EndpointOptions(SecretStr(SECRET))
    with JudgeServer(latency_s=0.05).running() as server:
        options = {"endpoint": endpoint._replace(base_url=server.url), "ledger": ledger, "prices": PRICES}
        with pytest.raises(ValueError, match="not taken"):
            ask_here(calls_to(server.url), limits=Limits(requests_per_minute=1200, max_concurrency=3), on_reply=take, **options)
    assert len(server.requests) < NUM and ledger.spent() == spent_on(len(server.requests))


def cut_then(fault):
    """Replies end at their limit, and a longer one is answered with `fault`."""
    return lambda _, request: fault if request["max_tokens"] > 100 else Fault(body=completion("cut", finish_reason="length"))


@pytest.mark.parametrize("status", [401, 500])
def test_a_reply_that_is_cut_is_kept_where_no_longer_one_can_be_had(ledger, status):
    with JudgeServer(cut_then(Fault(status, error("no")))).running() as server:
        for _ in range(2):
            [reply], asked = ask(server.url, ledger, calls=calls_to(server.url, 1), max_retries=0)
            assert not reply.error and read_completion(reply.body).problem and not asked.counters.possibly_paid_twice
    assert len(server.requests) == 2 and ledger.spent() == spent_on(1)


def test_a_reply_that_is_cut_is_kept_where_the_budget_buys_no_longer_one_then_or_later(ledger):
    with JudgeServer(cut_then(None)).running() as server:
        for number in (1, 3):
            limiter = Limiter(Limits(), Budget(calls=number), ledger.spent(), now=time.monotonic())
            [reply], asked = ask(server.url, ledger, calls=calls_to(server.url, 1), limiter=limiter)
            assert "cut at max_tokens" in read_completion(reply.body).problem and not asked.counters.possibly_paid_twice
            assert len(server.requests) == 1 and ledger.spent() == spent_on(1)


async def ask_through(gate, url, ledger, number=NUM):
    """What becomes of the calls of one caller, and the caller."""
    endpoint = EndpointOptions(SecretStr(SECRET), url)
    caller = Caller(name="x", options=endpoint, ledger=ledger, gate=gate, prices=PRICES, window=NUM)
    async with asyncio.timeout(60):
        return await asyncio.gather(*map(caller.ask, calls_to(url, number)), return_exceptions=True), caller


class HaltGate:
    """The first request may leave at once; the others an hour later, unless there is a refusal."""

    def __init__(self):
        self.reports, self.granted = [], 0

    async def lease(self, caller, asks, reports):
        self.reports += reports
        is_refused = any(report.result == "refused" for report in self.reports)
        moments = [0.0 if is_refused or not self.granted + i else 3600.0 for i in range(len(asks))]
        self.granted += len(asks)
        return Lease(tuple(Grant(moment, 0.0, 0.0, int(is_refused), 0.0) for moment in moments))


def test_calls_that_wait_for_their_moment_hand_it_back_when_another_one_is_refused(ledger):
    gate = HaltGate()

    def refuse_first(number, request):
        return Fault(429, error("slow down"), delay_s=0.2) if number == 1 else None  # by then the others wait

    async def run(url):
        ended, caller = await ask_through(gate, url, ledger)
        await caller.settle()
        return ended

    with JudgeServer(refuse_first).running() as server:
        ended = asyncio.run(run(server.url))
    assert winners(ended) == faultless() and len(server.requests) == NUM + 1
    results = [report.result for report in gate.reports if report.ask is not None]
    assert (results.count("refused"), results.count("unsent"), results.count("ok")) == (1, NUM - 1, NUM)


def test_a_way_to_the_limiter_that_breaks_ends_the_calls_and_keeps_what_is_in_flight(ledger):
    class BreakingGate(LocalGate):
        async def lease(self, caller, asks, reports):
            if reports:
                raise RuntimeError("the way broke")
            return await super().lease(caller, asks, reports)

    async def run(url, number):
        limiter = Limiter(Limits(requests_per_minute=12000), None, Spent(), now=time.monotonic())
        ended, caller = await ask_through(BreakingGate(limiter), url, ledger, number)
        with pytest.raises(RuntimeError, match="the way broke"):
            await caller.settle()
        return ended

    with JudgeServer().running() as server:
        ended = asyncio.run(run(server.url, NUM))
    assert [type(found) for found in ended].count(RuntimeError) == NUM - 1
    assert len(server.requests) == 1 and ledger.spent() == spent_on(1)
    with JudgeServer(cut_then(None)).running() as server:
        assert [type(found) for found in asyncio.run(run(server.url, 1))] == [RuntimeError]
    assert len(server.requests) == 1 and ledger.spent() == spent_on(2), "the cut one is kept"
