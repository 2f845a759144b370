"""The limiter of a cluster: an actor of the driver's, the callers' way to it, and the driver's watch over it."""

import threading
import time
from typing import Any, NamedTuple

from ray_jobs.core.progress import Bar, say
from ray_jobs.judging.calls import Budget, Counters, Limits
from ray_jobs.judging.ledger import Spent
from ray_jobs.judging.limiter import Ask, Lease, Limiter, Report, Stop

BEAT_S = 0.25
INTERRUPTED = "interrupted"
LOST = "the limiter is gone: its driver ended, or its node was lost"


class Told(NamedTuple):
    """What a limiter knows."""

    counters: Counters = Counters(usd=0.0)
    stopped: str = ""
    why: Stop = "pause"
    num_of_rows: int = 0


class LimiterActor:
    """The limiter on the clock of one process."""

    def __init__(self, limits: Limits, budget: Budget | None, spent: Spent):
        self._limiter = Limiter(limits, budget, spent, now=time.monotonic())

    def lease(self, caller: str, asks: list[Ask], reports: list[Report]) -> Lease:
        """As Limiter.lease."""
        return self._limiter.lease(caller, asks, reports, time.monotonic())

    def pause(self) -> None:
        """Grant nothing more; what is in flight comes back."""
        self._limiter.stop(INTERRUPTED, "pause")

    def beat(self) -> Told:
        """Note that the driver lives, and say how it goes."""
        self._limiter.beat(time.monotonic())
        return Told(self._limiter.counters, self._limiter.stopped, self._limiter.why, self._limiter.num_of_rows)


class RayGate:
    """The way to the limiter's actor."""

    def __init__(self, limiter: Any):
        self._limiter = limiter

    async def lease(self, caller: str, asks: list[Ask], reports: list[Report]) -> Lease:
        """As Limiter.lease."""
        import ray

        try:
            lease: Lease = await self._limiter.lease.remote(caller, asks, reports)
        except ray.exceptions.RayError:
            return Lease(stopped=LOST)
        return lease


class Watch:
    """The driver's side of the limiter: beats, and shows how it goes. A context manager."""

    def __init__(self, limiter: Any, title: str, total: int):
        self._limiter, self._title, self._total = limiter, title, total
        self._bar = Bar(title, "call")
        self._told, self._ended = Told(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="judge-calls", daemon=True)

    def look(self) -> Told:
        """Return what the limiter knows, or knew last; stopped is LOST where it is gone."""
        import ray

        try:
            self._told = ray.get(self._limiter.beat.remote(), timeout=60)
        except ray.exceptions.RayError:
            self._told = self._told._replace(stopped=self._told.stopped or LOST)
        return self._told

    def pause(self) -> None:
        """Let callers finish what is in flight, and send nothing more."""
        self._limiter.pause.remote()
        say(f"{self._title}: interrupted: waits for the calls in flight, which are paid for; once more ends at once, without them")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            counters, stopped, _, _ = self.look()
            note = f"{counters.rate_limited} refused, {counters.unscored} given up" if counters.rate_limited + counters.unscored else ""
            self._bar(counters.ok + counters.unscored, self._total, stopped or note)

    def __enter__(self) -> "Watch":
        self._bar.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.__exit__(*error)
