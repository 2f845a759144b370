"""Judge calls by actors of a real cluster: one limit for all, and drivers, callers and limiters that are killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from judge_asks import PRICES, SECRET, calls_to, faultless, winners
from judge_server import Fault, JudgeServer, Window, completion, verdict
from pydantic import SecretStr

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.storage import Storage
from ray_jobs.judging.calls import Budget, EndpointOptions, Limits, Prices
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.ray_calls import ask

pytestmark = pytest.mark.cluster
NUM, IN_FLIGHT = 40, 4
HERE = [str(folder) for folder in Path(__file__).parents[:2]]
DRIVER = """
import sys
sys.path[:0] = sys.argv[3:]
from ray_jobs.core.cluster import connect
from test_judge_calls import judge
with connect():
    judge(sys.argv[1], sys.argv[2])
"""


def judge(url, folder, *, number=NUM, limits=None, num_callers=2, **options):
    endpoint = EndpointOptions(SecretStr(SECRET), url, 30.0, 2)
    limits = limits or Limits(requests_per_minute=1800, max_concurrency=IN_FLIGHT)
    options = {"prices": PRICES, "budget": None, **options}
    calls = calls_to(url, number)
    return ask(calls, endpoint=endpoint, ledger=Ledger(Storage(folder)), limits=limits, num_callers=num_callers, title="judge", **options)


def told(asked, url):
    return winners([asked.replies[call.key] for call in calls_to(url, NUM)])


def wait_until(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_driver_that_is_killed_pays_again_only_for_what_was_in_flight(ray_cluster, tmp_path):
    ledger = Ledger(Storage(str(tmp_path / "replies")))
    with JudgeServer(latency_s=0.2).running() as server:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, server.url, ledger.folder.uri, *HERE], env=os.environ)
        try:
            wait_until(lambda: len(server.requests) >= NUM // 2)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        at_kill = len(server.requests)
        time.sleep(3)
        settled = len(server.requests)
        assert settled < NUM, "callers go on without a driver"
        time.sleep(1)
        assert len(server.requests) == settled and at_kill <= settled
        asked = judge(server.url, ledger.folder.uri)
        paid_twice = len(server.requests) - NUM
    assert told(asked, server.url) == faultless(NUM)
    assert 0 <= paid_twice <= IN_FLIGHT
    assert asked.counters.planned == NUM == asked.counters.cached + asked.counters.ok
    assert asked.counters.possibly_paid_twice <= IN_FLIGHT
    assert paid_twice <= ledger.spent().calls - NUM, "what may have been billed is counted"


def test_a_caller_and_the_limiter_that_die_are_replaced(ray_cluster, tmp_path):
    killed = []

    def kill(name):
        mine = psutil.Process().children(recursive=True)  # of this session's own cluster alone
        [process, *_] = [process for process in mine if name in " ".join(process.cmdline())]
        process.kill()
        killed.append(process.pid)

    def kill_both():
        for name, number in (("LimiterActor", NUM // 4), ("MapBatches(_Caller)", NUM // 2)):
            wait_until(lambda: len(server.requests) >= number)  # noqa: B023
            kill(name)

    with JudgeServer(latency_s=0.2).running() as server:
        killer = threading.Thread(target=kill_both)
        killer.start()
        asked = judge(server.url, str(tmp_path / "replies"))
        killer.join()
        assert len(set(killed)) == 2
        assert told(asked, server.url) == faultless(NUM) and not asked.stopped
        assert len(server.requests) <= NUM + 2 * IN_FLIGHT


def moved_name(number, request):
    """The longer half of the texts is answered by another model of the same name."""
    is_longer = "x" * (NUM // 2) in request["messages"][0]["content"]
    return Fault(body=completion(verdict(request), model="stub-1-new")) if is_longer else None


def test_four_callers_keep_to_one_limit_and_one_budget(ray_cluster, tmp_path):
    with JudgeServer(moved_name, latency_s=0.1, window=Window(20)).running() as server:
        asked = judge(server.url, str(tmp_path / "a"), limits=Limits(), num_callers=4)
        assert asked.counters.ok == NUM and server.num_refused == asked.counters.rate_limited <= NUM // 5  # late on a busy machine
        assert asked.models == {"stub-1": NUM // 2, "stub-1-new": NUM // 2}
        before = len(server.requests)
        asked = judge(server.url, str(tmp_path / "b"), limits=Limits(), budget=Budget(calls=7), num_callers=4)
        assert asked.counters.ok == 7 == len(asked.replies) and "budget of 7 calls is spent" in asked.stopped
        assert len(server.requests) - before == 7 + asked.counters.rate_limited
        again = judge(server.url, str(tmp_path / "a"), budget=Budget(calls=1))
        assert again.counters.cached == NUM and again.counters.sent == 0 and not again.stopped


def test_what_cannot_work_is_said(tmp_path):
    with pytest.raises(ConfigError, match="without prices"):
        judge("http://127.0.0.1:9/v1", str(tmp_path), budget=Budget(usd=1.0), prices=Prices())
    assert judge("http://127.0.0.1:9/v1", str(tmp_path), number=0).replies == {}
