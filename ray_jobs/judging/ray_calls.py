"""Judge calls over a Ray cluster: the one file of judging that knows Ray.

`ask` answers what the ledger has not, by actors of Ray Data.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from ray_jobs.core.cluster import RETRIES, name_lost_workers, progress_board, require
from ray_jobs.core.errors import EndpointError
from ray_jobs.core.progress import OnProgress
from ray_jobs.judging.calls import Asked, Budget, Call, Counters, EndpointOptions, Limits, Prices, Reply
from ray_jobs.judging.endpoint import Endpoint
from ray_jobs.judging.ledger import Intent, Ledger
from ray_jobs.judging.parse import read_completion

if TYPE_CHECKING:
    import pyarrow as pa

CPUS = 0.1
BLOCKS_PER_CALLER = 4


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
        EndpointError: no call can succeed: wrong key, unknown model, nobody there. What was answered is kept.
        StorageError: the ledger cannot be written.
    """
    planned = {call.key: call for call in calls}
    cached = ledger.replies(planned)
    new = [call for key, call in planned.items() if key not in cached]
    found = _run(new, endpoint, ledger, limits, prices, num_callers, title) if new else {}
    counters = Counters(planned=len(planned), cached=len(cached), sent=len(new))
    ok = [reply for reply in found.values() if not reply.error]
    counters = counters._replace(
        ok=len(ok),
        unscored=len(found) - len(ok),
        prompt_tokens=sum(reply.prompt_tokens for reply in ok),
        completion_tokens=sum(reply.completion_tokens for reply in ok),
    )
    return Asked(cached | found, counters)


def _run(
    calls: list[Call], endpoint: EndpointOptions, ledger: Ledger, limits: Limits, prices: Prices, num_callers: int, title: str
) -> dict[str, Reply]:
    require(title, {"CPU": CPUS})
    with progress_board(title, "call") as on_progress:
        options = {"endpoint": endpoint, "limits": limits, "ledger": ledger, "prices": prices, "on_progress": on_progress}
        rows = list(_map(calls, {**options, "total": len(calls)}, block_rows=limits.max_concurrency, size=1))
    fatal = [row.pop("fatal") for row in rows]
    found = {row.pop("key"): Reply(**row) for row in rows}
    refused = next((row.error for row, is_fatal in zip(found.values(), fatal, strict=True) if is_fatal), "")
    reason = refused or _why_all_failed(list(found.values()))
    if reason:
        raise EndpointError(f"{title}: {endpoint.base_url or 'the endpoint'} cannot be asked: {reason}; replies so far are kept")
    return found


def _why_all_failed(replies: list[Reply]) -> str:
    return replies[0].error if all(reply.error for reply in replies) else ""


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
    """Asks the endpoint, and keeps every reply before anybody reads it."""

    def __init__(
        self, *, endpoint: EndpointOptions, limits: Limits, ledger: Ledger, prices: Prices, on_progress: OnProgress, total: int
    ) -> None:
        self._endpoint = Endpoint(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
            max_concurrency=limits.max_concurrency,
            max_retries=endpoint.max_retries,
            timeout_s=endpoint.timeout_s,
        )
        self._ledger, self._prices, self._on_progress = ledger, prices, on_progress
        self._num_done, self._total = 0, total

    async def __call__(self, table: "pa.Table") -> AsyncIterator[dict[str, list[str]]]:
        """Yield rows of a key and a Reply, from Call rows."""
        calls = [Call(**json.loads(text)) for text in table["row"].to_pylist()]
        found = await asyncio.gather(*map(self._ask, calls))
        yield {"row": [json.dumps(row) for row in found]}

    async def _ask(self, call: Call) -> dict[str, Any]:
        kept = await asyncio.to_thread(self._ledger.reply, call.key)
        fatal = False
        if kept is None:
            before = await asyncio.to_thread(self._ledger.intent, call.key)
            await asyncio.to_thread(self._ledger.intend, call.key, Intent(before.sends + 1))
            raw = await self._endpoint.ask(call.request)
            read = read_completion(raw.body)
            tokens = (read.prompt_tokens, read.completion_tokens)
            kept, fatal = Reply(raw.body, raw.seconds, raw.error, *tokens, usd=self._prices.cost(*tokens)), raw.fatal
            if not kept.error:
                await asyncio.to_thread(self._ledger.keep, call.key, kept)
        self._num_done += 1
        self._on_progress(self._num_done, self._total, "")
        return {"key": call.key, **kept._asdict(), "fatal": fatal}
