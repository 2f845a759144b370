"""A model of our own as judge: replies made in the cluster, kept like those of an endpoint."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ray_jobs.core.progress import OnProgress
from ray_jobs.judging.calls import Asked, Call, Counters, Reply
from ray_jobs.judging.ledger import Ledger

Row = dict[str, Any]


class Engine(Protocol):
    """A loaded model, as serving has it."""

    def generate(self, chats: Sequence[Any], *, max_new_tokens: int, sampling_temperature: float, seed: int) -> list[Any]:
        """Return one completion a chat: text, finish_reason, prompt_tokens, completion_tokens."""


def ask_locally(
    calls: Iterable[Call],
    *,
    model: str,
    ledger: Ledger,
    batch_size: int,
    work: Callable[[list[Row]], Iterator[Row]],
    on_progress: OnProgress,
) -> Asked:
    """Return the reply to every call: from the ledger where it has one, else from workers of this cluster.

    Args:
        model: the name the replies bear.
        work: gives batches of calls to LocalWorkers, and yields what they return.
        on_progress: called after each batch.
    """
    planned = {call.key: call for call in calls}
    cached = ledger.replies(planned)
    made: dict[str, Reply] = {}
    for result in work(batches_of([call for key, call in planned.items() if key not in cached], batch_size)):
        made |= {key: Reply(**fields) for key, fields in result["replies"].items()}
        on_progress(len(cached) + len(made), len(planned), "")
    failed = sum(bool(reply.error) for reply in made.values())
    counters = Counters(
        planned=len(planned),
        cached=len(cached),
        sent=len(made),
        ok=len(made) - failed,
        prompt_tokens=sum(reply.prompt_tokens for reply in made.values()),
        completion_tokens=sum(reply.completion_tokens for reply in made.values()),
        unscored=failed,
        usd=0.0,
    )
    return Asked(cached | made, counters, models={model: len(cached) + len(made)})


def batches_of(calls: Iterable[Call], size: int) -> list[Row]:
    """Return the calls in batches of prompts of similar length, which pad little; a batch has one seed and one longest reply."""
    groups: dict[tuple[int, int], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.request["seed"], call.request["max_tokens"]), []).append(call)
    batches = []
    for group in groups.values():
        ordered = sorted(group, key=lambda call: (sum(len(message["content"]) for message in call.request["messages"]), call.key))
        batches += [[call._asdict() for call in ordered[start : start + size]] for start in range(0, len(ordered), size)]
    return [{"calls": batch} for batch in batches]


class LocalWorker:
    """Answers batches of calls with one model, loaded when the first comes, and keeps every reply before anybody reads it.

    Args:
        make_engine: loads the model, on the worker.
        ledger: where replies are kept.
        guard: holds the worker to its memory while it works.
    """

    def __init__(self, *, make_engine: Callable[[], Engine], ledger: Ledger, guard: Callable[[], AbstractContextManager[Any]]):
        self._make_engine = make_engine
        self._ledger = ledger
        self._guard = guard
        self._engine: Engine | None = None

    def __call__(self, batch: Row) -> Row:
        """Return {"replies": {key: Reply fields}} of {"calls": Call rows}."""
        calls = [Call(**row) for row in batch["calls"]]
        with self._guard():
            self._engine = self._engine or self._make_engine()
            replies = _answer(self._engine, calls)
        for call, reply in zip(calls, replies, strict=True):
            if not reply.error:
                self._ledger.keep(call.key, reply)
        return {"replies": {call.key: reply._asdict() for call, reply in zip(calls, replies, strict=True)}}


def _answer(engine: Engine, calls: list[Call]) -> list[Reply]:
    """One prompt that the model refuses fails its batch, so a failed batch goes on call by call."""
    request, began = calls[0].request, time.monotonic()
    options = {"max_new_tokens": request["max_tokens"], "sampling_temperature": request["temperature"], "seed": request["seed"]}
    try:
        made = engine.generate([call.request["messages"] for call in calls], **options)
    except (ValueError, RuntimeError, MemoryError) as error:
        if len(calls) > 1:
            return [_answer(engine, [call])[0] for call in calls]
        return [Reply("", time.monotonic() - began, f"{type(error).__name__}: {error}")]
    seconds = (time.monotonic() - began) / len(calls)
    return [_reply(call, completion, seconds) for call, completion in zip(calls, made, strict=True)]


def _reply(call: Call, made: Any, seconds: float) -> Reply:
    """As an endpoint would have sent it: one way to read all replies."""
    model, tokens = call.request["model"], (made.prompt_tokens, made.completion_tokens)
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    choice = {"index": 0, "message": {"role": "assistant", "content": made.text}, "finish_reason": made.finish_reason}
    body = {"id": f"local-{call.key}", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage}
    return Reply(json.dumps(body, ensure_ascii=False), round(seconds, 4), "", *tokens, model=model, usd=0.0)
