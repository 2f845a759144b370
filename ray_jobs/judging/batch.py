"""The provider's batch endpoint: all calls in one file, half the price, up to a day; the replies go into the same ledger.

What a batch holds is written before it is made, and its id before anybody waits for it: a killed run finds its batch again, by
the id or by the name it gave it (batch_records.py), and pays no second one. A batch that is refused leaves the ledger as it was.
Free of Ray: one process uploads and waits.
"""

import io
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ray_jobs.core.errors import EndpointError
from ray_jobs.core.records import content_id
from ray_jobs.judging.batch_records import BatchRecord, BatchRecords
from ray_jobs.judging.calls import Budget, Call, Counters, EndpointOptions, Prices, Reply
from ray_jobs.judging.endpoint import most_completion_tokens, most_prompt_tokens, read_reply, read_status, sayable
from ray_jobs.judging.ledger import THREADS, Intent, Ledger

HALF = 0.5
"""Of the price of calls. Source: OpenAI, "Batch API"; Anthropic, "Batch processing"."""
MOST_CALLS, MOST_BYTES = 50_000, 190 * 2**20
"""Of one batch. Source: OpenAI, "Batch API": 50,000 requests and 200 MB."""
POLL_S = 15.0
LABEL = "raystill"
_ENDED = {"completed", "failed", "expired", "cancelled"}
OnBatch = Callable[[int, int, str], None]


class BatchAsked(NamedTuple):
    """As calls.Asked, of the calls that were not answered before."""

    replies: dict[str, Reply]
    counters: Counters
    stopped: str = ""


def ask_batch(
    calls: list[Call],
    *,
    endpoint: EndpointOptions,
    ledger: Ledger,
    budget: Budget | None,
    prices: Prices,
    on_progress: OnBatch = lambda done, total, note: None,
    poll_s: float = POLL_S,
) -> BatchAsked:
    """Return the replies to calls by batches; those of an earlier run that are still out are waited for first.

    Raises:
        EndpointError: the endpoint refuses a batch. What was made or answered is kept.
        StorageError: the ledger cannot be written.
    """
    batches = _Batches(endpoint, ledger, prices, on_progress, poll_s)
    wanted = {call.key: call for call in calls}
    found = batches.fetch_open(wanted)
    stopped = ""
    new = [call for key, call in wanted.items() if key not in found]
    payable = _affordable(new, budget, ledger, prices)
    if len(payable) < len(new):
        stopped = f"the budget leaves {len(payable)} of {len(new)} calls at their highest price: raise [judge] budget_usd or max_calls"
    for chunk in _chunks(payable):
        found |= batches.fetch(*batches.make(chunk), wanted)
    unanswered = len(payable) - sum(call.key in found for call in payable)
    if unanswered:
        stopped = f"{unanswered} calls were not answered before their batch expired: run the same command again"
    return BatchAsked(found, _count(found, len(payable)), stopped)


def _count(found: dict[str, Reply], sent: int) -> Counters:
    ok = [reply for reply in found.values() if not reply.error]
    costs = [reply.usd for reply in found.values()]
    return Counters(
        sent=sent,
        ok=len(ok),
        unscored=len(found) - len(ok),
        prompt_tokens=sum(reply.prompt_tokens for reply in ok),
        completion_tokens=sum(reply.completion_tokens for reply in ok),
        estimated=sum(reply.is_estimated for reply in ok),
        usd=None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs),
    )


def _half(prices: Prices, prompt_tokens: int, completion_tokens: int) -> float | None:
    cost = prices.cost(prompt_tokens, completion_tokens)
    return None if cost is None else HALF * cost


def _worst(call: Call, prices: Prices) -> float | None:
    return _half(prices, most_prompt_tokens(call.request), most_completion_tokens(call.request))


def _affordable(calls: list[Call], budget: Budget | None, ledger: Ledger, prices: Prices) -> list[Call]:
    """Return the first calls that cannot pass the budget, whatever they come to."""
    if budget is None or not calls:
        return calls
    spent = ledger.spent(prices)
    usd, payable = spent.usd or 0.0, []
    for number, call in enumerate(calls, start=spent.calls + 1):
        usd += _worst(call, prices) or 0.0
        if (budget.calls is not None and number > budget.calls) or (budget.usd is not None and usd > budget.usd):
            break
        payable.append(call)
    return payable


def _line(call: Call) -> bytes:
    line = {"custom_id": call.key, "method": "POST", "url": "/v1/chat/completions", "body": call.request}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _chunks(calls: list[Call]) -> Iterable[list[Call]]:
    chunk: list[Call] = []
    size = 0
    for call in calls:
        length = len(_line(call))
        if chunk and (len(chunk) == MOST_CALLS or size + length > MOST_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(call)
        size += length
    if chunk:
        yield chunk


class _Batches:
    """The batches of one ledger at one endpoint."""

    def __init__(self, endpoint: EndpointOptions, ledger: Ledger, prices: Prices, on_progress: OnBatch, poll_s: float):
        from openai import OpenAI

        # reading again costs nothing; `make` turns repeats off where they would
        self._client: OpenAI = OpenAI(
            api_key=endpoint.api_key.get_secret_value(),
            base_url=endpoint.base_url,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.max_retries,
        )
        self._endpoint, self._ledger, self._prices = endpoint, ledger, prices
        self._records = BatchRecords(ledger)
        self._on_progress, self._poll_s = on_progress, poll_s

    def fetch_open(self, wanted: dict[str, Call]) -> dict[str, Reply]:
        """Wait for the batches of earlier runs that hold wanted calls."""
        found: dict[str, Reply] = {}
        for name, record in self._records.open(wanted).items():
            found |= self.fetch(name, record, wanted)
        return found

    def make(self, calls: list[Call]) -> tuple[str, BatchRecord]:
        """Make a batch and return its name and record; whoever is killed in between finds it by that name."""
        from openai import OpenAIError

        keys = [call.key for call in calls]
        name = content_id(keys, time.time_ns())
        try:
            upload = self._client.files.create(file=("calls.jsonl", io.BytesIO(b"".join(map(_line, calls)))), purpose="batch")
        except OpenAIError as error:
            raise self._error(error) from None
        with ThreadPoolExecutor(THREADS) as pool:
            before = dict(zip(keys, pool.map(self._ledger.intent, keys), strict=True))
            record = BatchRecord(keys, doubtful={key: intent.sends for key, intent in before.items() if intent.sends})
            self._records.write(name, record)
            list(pool.map(lambda call: self._intend(call, before[call.key]), calls))
        try:
            batch = self._client.with_options(max_retries=0).batches.create(
                input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={LABEL: name}
            )
        except OpenAIError as error:
            if _is_refused(error):
                self._take_back(name, record, before)
            raise self._error(error) from None
        record = record._replace(batch_id=batch.id)
        self._records.write(name, record)
        return name, record

    def _take_back(self, name: str, record: BatchRecord, before: dict[str, Intent]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._ledger.intend, before.keys(), before.values()))
        self._records.write(name, record._replace(is_done=True))

    def _intend(self, call: Call, before: Intent) -> None:
        tokens, usd = (most_prompt_tokens(call.request), most_completion_tokens(call.request)), _worst(call, self._prices)
        dearest = usd if usd is None or before.usd is None else max(usd, before.usd)  # earlier sends may have been at the full price
        self._ledger.intend(call.key, Intent(before.sends + 1, *tokens, dearest))

    def fetch(self, name: str, record: BatchRecord, wanted: dict[str, Call]) -> dict[str, Reply]:
        """Wait for a batch and keep its replies; those that it did not get to may be asked again."""
        from openai import OpenAIError

        try:
            batch_id = record.batch_id or self._find(name)
            batch = self._wait(batch_id, len(record.keys)) if batch_id else None
            lines = self._lines(batch) if batch is not None else []
        except OpenAIError as error:
            raise self._error(error) from None
        replies = {line["custom_id"]: self._reply(line, wanted) for line in lines if not _is_expired(line)}
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: self._settle(key, replies.get(key), record.doubtful.get(key, 0)), record.keys))
        self._records.write(name, record._replace(batch_id=batch_id, is_done=True))
        if batch is not None and batch.status == "failed":
            raise EndpointError(f"the endpoint refuses batch {batch_id}: {self._sayable(str(batch.errors))}; nothing was billed")
        return {key: reply for key, reply in replies.items() if key in wanted}

    def _settle(self, key: str, reply: Reply | None, doubtful: int) -> None:
        if reply is None or reply.error:  # never reached, or refused; billed only where it says so
            is_billed = reply is not None and reply.prompt_tokens + reply.completion_tokens > 0
            self._ledger.intend(key, self._ledger.intent(key)._replace(sends=doubtful + is_billed))
        else:
            self._ledger.keep(key, reply._replace(doubtful=doubtful))

    def _find(self, name: str) -> str:
        """Return the id of a batch that was made but not written down; empty where it was never made."""
        return next((batch.id for batch in self._client.batches.list() if (batch.metadata or {}).get(LABEL) == name), "")

    def _wait(self, batch_id: str, total: int) -> Any:
        while True:
            batch = self._client.batches.retrieve(batch_id)
            counts = batch.request_counts
            self._on_progress(counts.completed + counts.failed if counts else 0, total, f"batch {batch_id} {batch.status}")
            if batch.status in _ENDED:
                return batch
            time.sleep(self._poll_s)

    def _lines(self, batch: Any) -> list[dict[str, Any]]:
        texts = [self._client.files.content(file).text for file in (batch.output_file_id, batch.error_file_id) if file]
        return [json.loads(line) for text in texts for line in text.split("\n") if line.strip()]  # splitlines cuts at U+2028

    def _reply(self, line: dict[str, Any], wanted: dict[str, Call]) -> Reply:
        response = line.get("response") or {}
        body = response.get("body") or {}
        if response.get("status_code") != 200:
            code, text = _error_of((body.get("error") if isinstance(body, dict) else body) or line.get("error"))
            status = int(response.get("status_code") or 500)
            outcome = read_status(status, code, f"{status} - {text}", is_proven=True)
            return Reply("", 0.0, self._sayable(outcome.error), usd=0.0, may_pass=outcome.kind in {"failed", "refused"})
        raw = json.dumps(body)  # half a surrogate stays an escape, which can be written
        request = wanted[line["custom_id"]].request if line["custom_id"] in wanted else {"messages": []}
        found = read_reply(raw, request)
        tokens = (found.prompt_tokens, found.completion_tokens)
        usd = _half(self._prices, *tokens) if any(tokens) else 0.0
        return Reply(found.body, 0.0, self._sayable(found.error), *tokens, found.is_estimated, found.model, usd)

    def _error(self, error: Exception) -> EndpointError:
        where, text = self._endpoint.base_url or "the provider's endpoint", self._sayable(str(error))
        return EndpointError(f"{where} cannot be asked for a batch: {text}; the same command goes on where this one ended")

    def _sayable(self, error: str) -> str:
        return sayable(error, self._endpoint)


def _is_refused(error: Exception) -> bool:
    """Return whether an error says that no batch was made; one of the server's own, or a lost connection, may have come after it."""
    from openai import APIStatusError

    return isinstance(error, APIStatusError) and error.status_code < 500 and error.status_code != 408


def _error_of(error: Any) -> tuple[str, str]:
    """Return the code and the text of a line's error: an object, or of some servers a text alone."""
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or ""), str(error.get("message") or error)
    return "", str(error or "no reason is given")


def _is_expired(line: dict[str, Any]) -> bool:
    return _error_of(line.get("error"))[0] in {"batch_expired", "batch_cancelled"}
