"""A judge on loopback that speaks OpenAI's chat completions, keeps limits, and counts what it was paid for.

python -m benchmarks.judge_stub --port 8100 [--settings '{"requests_per_minute": 1200}']

POST /v1/chat/completions   a seeded verdict after the latency, or 429
POST /settings              new settings, all counts at zero
GET  /stats                 what was asked, served, refused, billed, and when

A call is billed when it is let in, whether or not the client waits for the reply: that is how providers bill. What counts
as the same call is the hash of its messages, so that "paid twice" is the server's word and not the client's.
"""

import argparse
import asyncio
import collections
import dataclasses
import hashlib
import json
import math
import random
import time
from typing import Any

from aiohttp import web

from benchmarks.judge_limits import KINDS, MINUTE_S, Bucket, Limit, most_in_window

CHARACTERS_PER_TOKEN = 4
MEAN_COMPLETION_TOKENS = 150
LATENCY_SIGMA = 0.5
TICK_S = 0.02
WINNERS = ("A", "B", "tie")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the stub does; times in seconds, limits a minute.

    Args:
        latency: "fixed", "lognormal" with `latency_s` as median, or "tokens": proportional to the completion's tokens.
        requests_per_minute: None is no limit; so for tokens_per_minute.
        enforced: "bucket" that holds `span_s` seconds of the limit, or sliding "window" of `span_s` seconds.
        rejected_count: whether a refused call uses up the limit.
        headers: send x-ratelimit-*, which always speak of a bucket of a minute, whatever is enforced.
        retry_after: send retry-after and retry-after-ms with 429.
        about: calls whose messages lack this text, as a client's trial call, are answered at once and not counted.
        change_after: after so many calls let in, `change` replaces settings.
    """

    latency: str = "fixed"
    latency_s: float = 0.3
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    enforced: str = "window"
    span_s: float = 1.0
    rejected_count: bool = False
    headers: bool = True
    retry_after: bool = True
    seed: int = 0
    about: str = ""
    change_after: int | None = None
    change: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Counts:
    """What happened since the settings were given; times in seconds since the first request."""

    asked_at: list[float] = dataclasses.field(default_factory=list)
    let_in_at: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    billed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: int = 0
    replied: int = 0
    first_reply_at: float | None = None
    last_reply_at: float = 0.0
    in_flight: int = 0
    most_in_flight: int = 0
    changed_at: float | None = None
    most_late_s: float = 0.0


class Judge:
    """The limits, the verdicts and the bill."""

    def __init__(self, settings: Settings):
        self.begin(settings)

    def begin(self, settings: Settings) -> None:
        """Forget everything and go on with these settings."""
        self.counts = Counts()
        self._start: float | None = None
        self._use(settings)

    def _use(self, settings: Settings) -> None:
        self.settings = settings
        kind = KINDS[settings.enforced]
        minute = {"requests": settings.requests_per_minute, "tokens": settings.tokens_per_minute}
        self._limits: dict[str, Limit] = {what: kind(limit, settings.span_s) for what, limit in minute.items() if limit}
        self._shown = {what: Bucket(limit, MINUTE_S) for what, limit in minute.items() if limit}

    def now(self) -> float:
        """Return the seconds since the first request."""
        if self._start is None:
            self._start = time.monotonic()
        return time.monotonic() - self._start

    async def answer(self, request: web.Request) -> web.Response:
        """Let a call in and reply after the latency, or refuse it."""
        try:
            body = await request.json()
        except ConnectionResetError:  # a client that was killed while it sent
            return web.Response(status=400)
        messages = json.dumps(body["messages"], sort_keys=True)
        key = hashlib.sha256(messages.encode()).hexdigest()
        chance = random.Random(f"{self.settings.seed} {key}")
        usage = usage_of(body, chance)
        if self.settings.about not in messages:
            return web.json_response(completion(body["model"], key, chance, usage), headers=self._headers(0.0))
        now, counts = self.now(), self.counts
        counts.asked_at.append(now)
        wait_s = self._admit(now, usage["total_tokens"])
        if wait_s > 0:
            counts.refused += 1
            return self._refusal(now, wait_s)
        counts.let_in_at.append(now)
        counts.tokens.append(usage["total_tokens"])
        counts.billed[key] += 1
        counts.in_flight += 1
        counts.most_in_flight = max(counts.most_in_flight, counts.in_flight)
        headers, latency_s = self._headers(now), self._latency(usage["completion_tokens"], chance)
        if len(counts.let_in_at) == self.settings.change_after:
            counts.changed_at = now
            self._use(dataclasses.replace(self.settings, **self.settings.change))
        try:
            await asyncio.sleep(latency_s)
        finally:
            counts.in_flight -= 1
        counts.replied += 1
        counts.last_reply_at = self.now()
        counts.first_reply_at = counts.last_reply_at if counts.first_reply_at is None else counts.first_reply_at
        return web.json_response(completion(body["model"], key, chance, usage), headers=headers)

    def _admit(self, now: float, tokens: int) -> float:
        """Return 0 and count a call that the limits let in; otherwise the seconds to wait."""
        amounts = {"requests": 1, "tokens": tokens}
        wait_s = max((limit.wait_s(now, amounts[what]) for what, limit in self._limits.items()), default=0.0)
        if wait_s <= 0 or self.settings.rejected_count:
            for what in self._limits:
                self._limits[what].take(now, amounts[what])
                self._shown[what].take(now, amounts[what])
        return wait_s

    def _latency(self, tokens: int, chance: random.Random) -> float:
        if self.settings.latency == "tokens":
            return self.settings.latency_s * tokens / MEAN_COMPLETION_TOKENS
        return self.settings.latency_s * (chance.lognormvariate(0, LATENCY_SIGMA) if self.settings.latency == "lognormal" else 1)

    def _headers(self, now: float) -> dict[str, str]:
        if not self.settings.headers:
            return {}
        found = {}
        for what, bucket in self._shown.items():
            left = max(0.0, bucket.left(now))
            found[f"x-ratelimit-limit-{what}"] = f"{bucket.capacity:.0f}"
            found[f"x-ratelimit-remaining-{what}"] = f"{left:.0f}"
            found[f"x-ratelimit-reset-{what}"] = f"{(bucket.capacity - left) / bucket.rate * 1000:.0f}ms"
        return found

    def _refusal(self, now: float, wait_s: float) -> web.Response:
        headers = self._headers(now)
        if self.settings.retry_after:
            headers |= {"retry-after": f"{math.ceil(wait_s)}", "retry-after-ms": f"{math.ceil(wait_s * 1000)}"}
        error = {"message": f"Rate limit reached: try again in {wait_s:.3f}s", "type": "requests", "code": "rate_limit_exceeded"}
        return web.json_response({"error": error}, status=429, headers=headers)

    def stats(self) -> dict[str, Any]:
        """Return the counts as JSON takes them."""
        counts = self.counts
        asked, let_in = counts.asked_at, counts.let_in_at
        span_s = counts.last_reply_at or (asked[-1] if asked else 0.0)
        return {
            "asked": len(asked),
            "billed": sum(counts.billed.values()),
            "distinct": len(counts.billed),
            "paid_twice": sum(counts.billed.values()) - len(counts.billed),
            "refused": counts.refused,
            "replied": counts.replied,
            "billed_tokens": sum(counts.tokens),
            "in_flight": counts.in_flight,
            "most_in_flight": counts.most_in_flight,
            "span_s": span_s,
            "first_reply_at": counts.first_reply_at,
            "served_per_s": counts.replied / span_s if span_s else 0.0,
            "most_asked_in_1s": most_in_window(asked, 1.0),
            "most_let_in_in_1s": most_in_window(let_in, 1.0),
            "changed_at": counts.changed_at,
            "let_in_at": [round(at, 3) for at in let_in],
            "tokens": counts.tokens,
            "most_late_s": counts.most_late_s,
        }

    async def watch_lateness(self) -> None:
        """Note how late this process wakes up: a stub that is late measures itself."""
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.counts.most_late_s = max(self.counts.most_late_s, time.monotonic() - due)


def usage_of(body: dict[str, Any], chance: random.Random) -> dict[str, int]:
    """Return the tokens of a call: characters by four for the prompt, drawn by the seed for the completion."""
    prompt = sum(len(message["content"]) for message in body["messages"]) // CHARACTERS_PER_TOKEN
    drawn = round(chance.uniform(0.5, 1.5) * MEAN_COMPLETION_TOKENS)
    wanted = min(drawn, body.get("max_tokens") or body.get("max_completion_tokens") or drawn)
    return {"prompt_tokens": prompt, "completion_tokens": wanted, "total_tokens": prompt + wanted}


def completion(model: str, key: str, chance: random.Random, usage: dict[str, int]) -> dict[str, Any]:
    """Return the body of a reply: reasoning first, then a winner."""
    verdict = {"reasoning": "Answer A names the timer, answer B does not.", "winner": chance.choice(WINNERS)}
    lists = {"missing_a": [], "wrong_a": [], "missing_b": ["the timer"], "wrong_b": []}
    message = {"role": "assistant", "content": json.dumps(verdict | lists)}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return {"id": f"stub-{key[:12]}", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage}


def application(judge: Judge) -> web.Application:
    """Return the server's routes."""

    async def begin(request: web.Request) -> web.Response:
        judge.begin(Settings(**await request.json()))
        return web.json_response({})

    async def stats(_: web.Request) -> web.Response:
        return web.json_response(judge.stats())

    async def watched(app: web.Application) -> Any:
        task = asyncio.create_task(judge.watch_lateness())
        yield
        task.cancel()

    app = web.Application()
    app.cleanup_ctx.append(watched)
    app.add_routes([web.post("/v1/chat/completions", judge.answer), web.post("/settings", begin), web.get("/stats", stats)])
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of Settings as JSON")
    options = parser.parse_args()
    web.run_app(application(Judge(Settings(**options.settings))), host="127.0.0.1", port=options.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
