"""Judge calls over a Ray cluster: actors that send them at the pace of one limiter.

The actors are Ray Data's. One more, the driver's own, holds the limiter (ray_limiter.py): when the driver dies, it dies, and
without it nobody sends. What was paid for by then is in the ledger, where the next `ask` finds it. A driver that is
interrupted, not killed, waits for what is in flight.
"""

import asyncio
import gc
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_jobs.core.cluster import RETRIES, name_lost_workers, require
from ray_jobs.core.errors import ConfigError, EndpointError, EndpointRefused, StorageError
from ray_jobs.core.interrupts import interrupt_late
from ray_jobs.core.progress import Bar, say
from ray_jobs.judging.batch import ask_batch
from ray_jobs.judging.batch_records import BatchRecords
from ray_jobs.judging.caller import SETTLE_S, Caller
from ray_jobs.judging.calls import Asked, Budget, Call, Counters, EndpointOptions, Limits, Prices, Reply
from ray_jobs.judging.ledger import Ledger, Spent
from ray_jobs.judging.ray_limiter import LOST, LimiterActor, RayGate, Told, Watch

if TYPE_CHECKING:
    import pyarrow as pa

CPUS = 0.1
BLOCKS_PER_CALLER, BLOCKS_PER_WINDOW = 32, 8
"""Blocks that a caller works on at once, and that make its window: a block ends with its slowest call, three windows wait beside it."""
LIMITERS = 3
"""Times that a limiter is started: one may be lost with its node."""


class _Order(NamedTuple):
    """How calls are asked, whichever and however often; as `ask` has it, with the budget None where it is empty."""

    endpoint: EndpointOptions
    ledger: Ledger
    limits: Limits
    budget: Budget | None
    prices: Prices
    num_callers: int
    title: str


def ask(
    calls: list[Call],
    *,
    endpoint: EndpointOptions,
    ledger: Ledger,
    limits: Limits,
    budget: Budget | None = None,
    prices: Prices,
    num_callers: int,
    title: str,
) -> Asked:
    """Return the reply to every call: from the ledger where it has one, else from the endpoint. Needs a connected cluster.

    Args:
        ledger: keeps each reply before anybody reads it; what it holds counts against the budget.
        num_callers: actors that send calls, under one limit.
        title: what the progress bar is called.

    Raises:
        ConfigError: a budget in dollars without prices, or a batch of an earlier run that holds some of the calls.
        EndpointRefused: no call can succeed: wrong key, unknown model, nobody there. What was answered is kept.
        EndpointError: every call was given up.
        StorageError: the ledger cannot be written.
    """
    budget = budget if budget != Budget() else None
    if budget is not None and budget.usd is not None and prices.cost(1, 1) is None:
        raise ConfigError(
            f"{title}: a budget of ${budget.usd:g} cannot be kept without prices: set usd_per_million_prompt_tokens and "
            "usd_per_million_completion_tokens, or budget by max_calls"
        )
    order = _Order(endpoint, ledger, limits, budget, prices, num_callers, title)
    planned = {call.key: call for call in calls}
    cached = ledger.replies(planned)
    if endpoint.backend == "batch":
        return _by_batch(planned, cached, order)
    _check_batches(ledger, planned.keys() - cached.keys(), title)
    replies, told, lost = dict(cached), Told(), []
    for _ in range(LIMITERS):
        new = [call for key, call in planned.items() if key not in replies]
        if not new or told.stopped:
            break
        spent = ledger.spent(prices) if budget is not None else Spent()
        found, told = _run(new, spent, order)
        replies |= found
        lost.append(told.counters)
        if told.stopped == LOST:
            say(f"{title}: {LOST}; starting another")
            told = told._replace(stopped="")
    _raise(told, replies, title=title, base_url=endpoint.base_url)
    return _asked(planned, cached, replies, lost, told)


def _check_batches(ledger: Ledger, keys: set[str], title: str) -> None:
    records = BatchRecords(ledger)
    for name, batch in records.open(keys).items():
        held = f"of an earlier run holds {len(keys.intersection(batch.keys))} of these calls, which would be paid twice: run once more with"
        if batch.batch_id:
            how = "which fetches it (cancel it at the provider first to have what it has by now)"
            raise ConfigError(f'{title}: batch {batch.batch_id} {held} backend = "batch", {how}')
        how = f"which finds out, or, where the provider lists no batch whose metadata names {name}, delete {records.path(name)}"
        raise ConfigError(f'{title}: a batch that may have been made {held} backend = "batch", {how}')


def _by_batch(planned: dict[str, Call], cached: dict[str, Reply], order: _Order) -> Asked:
    """The endpoint does the work: one process hands it over and waits."""
    new = [call for key, call in planned.items() if key not in cached]
    options: Any = {"endpoint": order.endpoint, "ledger": order.ledger, "budget": order.budget, "prices": order.prices}
    with Bar(order.title, "call", each_note=True) as bar:
        found = ask_batch(new, **options, on_progress=bar)
    told = Told(found.counters, found.stopped)
    return _asked(planned, cached, cached | found.replies, [found.counters], told)


def _raise(told: Told, replies: dict[str, Reply], *, title: str, base_url: str | None) -> None:
    if told.why == "storage":
        raise StorageError(told.stopped)
    reason = told.stopped if told.why == "endpoint" else ""
    if not reason and not told.stopped and not told.num_of_rows and replies and all(reply.error for reply in replies.values()):
        reason = next(iter(replies.values())).error
    if reason:
        where = base_url or "the provider's endpoint"
        kind = EndpointRefused if told.why == "endpoint" else EndpointError
        raise kind(f"{title}: {where} cannot be asked: {reason}; replies so far are kept: run the same command again")


def _asked(planned: dict[str, Call], cached: dict[str, Reply], replies: dict[str, Reply], runs: list[Counters], told: Told) -> Asked:
    total: dict[str, Any] = {name: sum(getattr(run, name) or 0 for run in runs) for name in Counters._fields}
    total["usd"] = None if any(run.usd is None for run in runs) else total["usd"]
    new = [reply for key, reply in replies.items() if key not in cached]
    total |= {"planned": len(planned), "cached": len(cached), "ok": sum(not reply.error for reply in new)}
    total |= {"unscored": len(new) - total["ok"]}
    models: dict[str, int] = {}
    for reply in replies.values():
        if reply.model:
            models[reply.model] = models.get(reply.model, 0) + 1
    missing = len(planned) - len(replies)
    stopped = told.stopped or (f"{missing} calls were not asked: {LOST} {LIMITERS} times" if missing else "")
    return Asked(replies, Counters(**total), stopped, models)


def _run(calls: list[Call], spent: Spent, order: _Order) -> tuple[dict[str, Reply], Told]:
    import ray

    size = max(1, min(order.num_callers, order.limits.max_concurrency, len(calls)))
    window = order.limits.max_concurrency // size
    require(order.title, {"CPU": CPUS}, size)
    limiter: Any = ray.remote(num_cpus=0, max_restarts=0)(LimiterActor).remote(order.limits, order.budget, spent)
    options = {"endpoint": order.endpoint, "ledger": order.ledger, "prices": order.prices, "window": window, "limiter": limiter}
    try:
        patience_s = order.endpoint.timeout_s + SETTLE_S
        with Watch(limiter, order.title, len(calls)) as watch, interrupt_late(watch.pause, patience_s=patience_s):
            rows = list(_map(calls, options, block_rows=max(1, window // BLOCKS_PER_WINDOW), size=size))
            told = watch.look()
    finally:
        ray.kill(limiter)
    return {row["key"]: Reply(**row["reply"]) for row in rows if row["reply"]}, told


def _map(calls: list[Call], options: Any, *, block_rows: int, size: int) -> Iterator[dict[str, Any]]:
    """Yield what callers make of calls, in no order. Rows travel as JSON: no type is guessed from what is None."""
    import ray

    items = [{"row": json.dumps(call._asdict())} for call in calls]
    dataset = ray.data.from_items(items, override_num_blocks=max(1, -(-len(items) // block_rows)))
    pool = ray.data.ActorPoolStrategy(size=size, max_concurrent_calls_per_actor=BLOCKS_PER_CALLER)
    resources: dict[str, Any] = {"num_cpus": CPUS, **RETRIES}
    mapped = dataset.map_batches(_Caller, fn_constructor_kwargs=options, batch_size=None, batch_format="pyarrow", compute=pool, **resources)
    with name_lost_workers("judge calls"):
        for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
            table: Any = batch
            yield from map(json.loads, table["row"].to_pylist())


class _Caller:
    """A Ray Data worker around a Caller."""

    def __init__(self, *, endpoint: EndpointOptions, ledger: Ledger, prices: Prices, window: int, limiter: Any):
        gate, name = RayGate(limiter), uuid.uuid4().hex
        self._caller = Caller(name=name, options=endpoint, ledger=ledger, gate=gate, prices=prices, window=window)
        gc.freeze()  # else the collector looks through all that was imported in the midst of the run, and nothing leaves meanwhile

    async def __call__(self, table: "pa.Table") -> AsyncIterator[dict[str, list[str]]]:
        """Yield rows of a key and a Reply, None for one never asked, from Call rows."""
        calls = [Call(**json.loads(text)) for text in table["row"].to_pylist()]
        replies = await asyncio.gather(*map(self._caller.ask, calls))
        await self._caller.settle()
        told = ((call.key, reply._asdict() if reply is not None else None) for call, reply in zip(calls, replies, strict=True))
        yield {"row": [json.dumps({"key": key, "reply": reply}) for key, reply in told]}
