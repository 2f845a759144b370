"""Calls to an endpoint from this process alone, without Ray: the same limiter, ledger and repeats."""

import asyncio
import time
from collections.abc import Callable

from ray_jobs.core.interrupts import interrupt_late
from ray_jobs.judging.caller import SETTLE_S, Caller, LocalGate
from ray_jobs.judging.calls import Call, EndpointOptions, Limits, Prices, Reply
from ray_jobs.judging.ledger import Ledger, Spent
from ray_jobs.judging.limiter import Limiter


def ask_here(
    calls: list[Call],
    *,
    endpoint: EndpointOptions,
    ledger: Ledger,
    limits: Limits,
    prices: Prices | None = None,
    limiter: Limiter | None = None,
    on_reply: Callable[[Call, Reply], None] = lambda call, reply: None,
) -> Limiter:
    """Ask every call, and return the limiter, which knows the counters and why it stopped, if it did.

    An interrupt, or an error of `on_reply`, is raised when what is in flight has come back and is kept; a second interrupt at once.

    Args:
        limiter: none is one without a budget.
        on_reply: told of each reply as it comes, also of those that the ledger has and those that are errors.
    """
    chosen = limiter or Limiter(limits, None, Spent(), now=time.monotonic())

    async def run() -> None:
        gate = LocalGate(chosen)
        caller = Caller(name="here", options=endpoint, ledger=ledger, gate=gate, prices=prices or Prices(), window=limits.max_concurrency)

        async def one(call: Call) -> None:
            reply = await caller.ask(call)
            if reply is None:
                return
            try:
                await asyncio.to_thread(on_reply, call, reply)
            except Exception as error:
                chosen.stop(f"a reply was not taken: {error}", "pause")
                raise

        ended = await asyncio.gather(*map(one, calls), return_exceptions=True)  # an error of one loses no reply to another
        errors = [error for error in ended if error is not None]
        if errors:
            raise errors[0]
        await caller.settle()

    with interrupt_late(lambda: chosen.stop("interrupted", "pause"), patience_s=endpoint.timeout_s + SETTLE_S):
        asyncio.run(run())
    return chosen
