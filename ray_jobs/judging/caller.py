"""One caller: many calls in flight at once, each sent in its moment, kept before it is read, repeated as its failure asks.

Free of Ray: the limiter is reached through `Gate`, in this process or in an actor.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

from ray_jobs.core.errors import StorageError
from ray_jobs.judging.calls import Call, EndpointOptions, Prices, Reply
from ray_jobs.judging.endpoint import Endpoint
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.limiter import Ask, Grant, Lease, Limiter, Report
from ray_jobs.judging.pace import LATE_S
from ray_jobs.judging.tries import Tries, read_outcome

T = TypeVar("T")
LEASE_EVERY_S = 0.05
"""Reports and asks of this time go in one block."""
MOST_ASKS = 128
ALIVE_S = 5.0
SETTLE_S = 15.0
"""A stopped caller's last reply is kept so long after the endpoint's timeout at the latest: it hears of the stop within ALIVE_S."""
KEEP_AGAIN_S = (0.2, 0.8)
"""A storage that fails for a moment loses no reply that is paid for."""
THREADS = 16


class Gate(Protocol):
    """The way to the limiter."""

    async def lease(self, caller: str, asks: list[Ask], reports: list[Report]) -> Lease:
        """As Limiter.lease; a gate whose limiter is gone returns a stopped lease."""
        ...


class LocalGate:
    """The way to a limiter in this process, which is the only one that calls."""

    def __init__(self, limiter: Limiter):
        self._limiter = limiter

    async def lease(self, caller: str, asks: list[Ask], reports: list[Report]) -> Lease:
        """As Limiter.lease."""
        now = time.monotonic()
        self._limiter.beat(now)
        return self._limiter.lease(caller, asks, reports, now)


class _Permit(NamedTuple):
    grant: Grant
    moment: float


class Caller:
    """Answers calls.

    Args:
        name: tells callers apart.
        window: calls in flight, at most.
    """

    def __init__(self, *, name: str, options: EndpointOptions, ledger: Ledger, gate: Gate, prices: Prices, window: int):
        self._name, self._options, self._ledger, self._gate, self._prices = name, options, ledger, gate, prices
        self._endpoint = Endpoint(options)
        self._free = window
        self._waiting: deque[tuple[Ask, asyncio.Future[_Permit | None]]] = deque()
        self._reports: list[Report] = []
        self._num_reports = self._num_told = self._num_open = 0
        self._changed = asyncio.Event()
        self._leasing: asyncio.Task[None] | None = None
        self._broken: BaseException | None = None
        self._threads = ThreadPoolExecutor(THREADS)
        self._episode, self._stopped = -1, False
        self._halted = asyncio.Event()  # a new one each time

    async def ask(self, call: Call) -> Reply | None:
        """Return the reply to a call, or one with the error that it was given up for; None where all asking has stopped."""
        self._num_open += 1
        if self._leasing is None or self._leasing.done():
            self._leasing = asyncio.get_running_loop().create_task(self._lease_blocks())
            self._leasing.add_done_callback(self._end)
        try:
            kept = await self._in_thread(self._ledger.reply, call.key)
            return kept if kept is not None or self._stopped else await self._answer(call)
        except StorageError as error:  # read before anything was sent
            self._report(Report("unsent", stop=str(error), is_storage=True), slot=False)
            return None
        finally:
            self._num_open -= 1
            self._changed.set()

    async def settle(self) -> None:
        """Wait until the limiter knows all that has happened so far; an error of the way to it is raised."""
        target = self._num_reports
        while self._num_told < target:
            if self._broken is not None:
                raise self._broken
            await asyncio.sleep(LEASE_EVERY_S / 2)

    async def _answer(self, call: Call) -> Reply | None:
        tries = Tries.of(call.request, await self._in_thread(self._ledger.intent, call.key))
        while True:
            ask = tries.ask(self._prices)
            try:
                permit = await self._permit(ask)
            except Exception:  # of the way to the limiter: what is paid for is kept all the same
                await self._leave(call, tries)
                raise
            if permit is None:
                return await self._leave(call, tries)
            refused = await self._prepare(call, ask, permit, tries)
            tries = tries._replace(intended=tries.billed + 1)
            if refused is not None:
                self._report(refused)
                continue
            outcome = await self._endpoint.send(tries.request)
            if outcome.kind == "refused":
                self._episode = max(self._episode, permit.grant.episode)
                self._halt()
            report, tries, wait_s = read_outcome(outcome, ask, permit.grant, tries, prices=self._prices, options=self._options)
            if report.result in {"ok", "gave_up"}:
                return await self._finish(call, tries.reply(outcome, self._prices), report, tries)
            self._report(report)
            await asyncio.sleep(wait_s)

    async def _prepare(self, call: Call, ask: Ask, permit: _Permit, tries: Tries) -> Report | None:
        """Write the intent and wait for the moment; return a report where the request must not leave."""
        try:
            await self._in_thread(self._ledger.intend, call.key, tries.intent(tries.billed + 1, self._prices))
        except StorageError as error:
            return Report("unsent", ask, permit.grant, stop=str(error), is_storage=True)
        while self._holds(permit.grant) and (wait_s := permit.moment - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._halted.wait(), wait_s)
        if not self._holds(permit.grant):
            return Report("unsent", ask, permit.grant)
        if (late_s := time.monotonic() - permit.moment) > LATE_S:
            self._report(Report("late", grant=permit.grant, late_s=late_s), slot=False)
        return None

    def _holds(self, grant: Grant) -> bool:
        """A moment that was given before a refusal lies in the pause."""
        return grant.episode > self._episode and not self._stopped

    async def _leave(self, call: Call, tries: Tries) -> Reply | None:
        """Return a reply that was cut and is paid for, where one is held, now that no longer one will be asked for."""
        if tries.cut is not None:
            return await self._finish(call, tries.reply(tries.cut, self._prices), Report("gave_up"), tries, slot=False)
        await self._withdraw(call, tries)
        return None

    async def _withdraw(self, call: Call, tries: Tries) -> None:
        """Take back the intent of a send that never was, or was not billed: it counts against no budget."""
        if tries.intended > tries.billed:
            await self._in_thread(self._ledger.intend, call.key, tries.intent(tries.billed, self._prices))

    async def _finish(self, call: Call, reply: Reply, report: Report, tries: Tries, *, slot: bool = True) -> Reply:
        try:
            if not reply.error:
                kept = await self._keep(call.key, reply)
                report, reply = report._replace(paid_twice=kept is not reply), kept
            await self._withdraw(call, tries)
        except StorageError as error:
            report = report._replace(stop=str(error), is_storage=True)
        self._report(report, slot=slot)
        return reply

    async def _keep(self, key: str, reply: Reply) -> Reply:
        for pause_s in KEEP_AGAIN_S:
            try:
                return await self._in_thread(self._ledger.settle, key, reply)
            except StorageError:
                await asyncio.sleep(pause_s)
        return await self._in_thread(self._ledger.settle, key, reply)

    def _permit(self, ask: Ask) -> "asyncio.Future[_Permit | None]":
        """Return a future permit; what is sent again goes first."""
        future: asyncio.Future[_Permit | None] = asyncio.get_running_loop().create_future()
        if self._broken is not None:
            future.set_exception(self._broken)
        elif self._stopped:
            future.set_result(None)
        elif ask.is_again:
            self._waiting.appendleft((ask, future))
        else:
            self._waiting.append((ask, future))
        self._changed.set()
        return future

    def _report(self, report: Report, *, slot: bool = True) -> None:
        self._free += slot
        self._num_reports += 1
        self._reports.append(report)
        self._changed.set()

    async def _lease_blocks(self) -> None:
        """Trade reports and asks for grants as long as calls are open."""
        while self._num_open or self._reports:
            await self._lease_block()

    def _end(self, leasing: asyncio.Task[None]) -> None:
        """An error of leasing is that of all calls that want another send."""
        self._broken = None if leasing.cancelled() else leasing.exception()
        while self._broken is not None and self._waiting:
            self._waiting.popleft()[1].set_exception(self._broken)

    async def _lease_block(self) -> None:
        self._changed.clear()
        number = 0 if self._stopped else min(self._free, MOST_ASKS, len(self._waiting))
        block = [self._waiting.popleft() for _ in range(number)]
        reports, self._reports = self._reports, []
        try:
            lease = await self._gate.lease(self._name, [ask for ask, _ in block], reports)
        except Exception:
            self._waiting.extendleft(reversed(block))
            raise
        self._num_told += len(reports)
        self._waiting.extendleft(reversed(block[len(lease.grants) :]))
        for (_, future), grant in zip(block, lease.grants, strict=False):
            self._free -= 1
            future.set_result(_Permit(grant, time.monotonic() + grant.delay_s))
        if lease.stopped:
            self._stop()
        await self._wait(lease)

    async def _wait(self, lease: Lease) -> None:
        await asyncio.sleep(LEASE_EVERY_S)
        is_wanted = bool(self._waiting) and self._free > 0
        if self._num_open and not self._reports:
            with contextlib.suppress(TimeoutError):
                wait_s = lease.wait_s if is_wanted else ALIVE_S
                await asyncio.wait_for(self._changed.wait(), max(wait_s - LEASE_EVERY_S, 0.001))

    def _halt(self) -> None:
        """Let those who wait for their moment look whether it still holds: what is handed back at once is given to others."""
        self._halted.set()
        self._halted = asyncio.Event()

    def _stop(self) -> None:
        self._stopped = True
        self._halt()
        while self._waiting:
            self._waiting.popleft()[1].set_result(None)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
