"""A language model as judge, through the official client, at any OpenAI-compatible endpoint."""

import asyncio
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import SecretStr

from ray_jobs.core.records import content_id
from ray_jobs.judging.pairs import Game, Ruling, settle
from ray_jobs.judging.parse import read_completion, read_opinion
from ray_jobs.judging.rubric import RUBRIC_SHA, SCHEMA, messages

if TYPE_CHECKING:
    from openai import OpenAIError

Request = dict[str, Any]
PER_MILLION = 1e6
UNSENT = "not asked: the endpoint refused an earlier call"


class Reply(NamedTuple):
    """The raw body of a reply, or the error that came instead.

    `fatal` says that every other call would fail alike: wrong key, unknown model, no credit, nobody there.
    """

    body: str
    seconds: float
    error: str = ""
    fatal: bool = False


class Prices(NamedTuple):
    """US dollars for a million tokens; None where unknown."""

    prompt: float | None = None
    completion: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return the price of one call in US dollars; None unless both prices are known."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / PER_MILLION


def make_request(game: Game, *, model: str, max_tokens: int, seed: int, structured: bool) -> Request:
    """Return the body of the call that judges a game.

    Args:
        structured: send the JSON schema of the reply; without, the rubric's words alone ask for it.
    """
    request: Request = {
        "model": model,
        "messages": messages(game.question, game.reference, *game.shown),
        "temperature": 0.0,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    if structured:
        schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
        request["response_format"] = {"type": "json_schema", "json_schema": schema}
    return request


def request_key(request: Request, base_url: str | None) -> str:
    """Return the hash under which the reply to a request is kept."""
    return content_id(base_url or "", request)


def rubric_sha(model: str) -> str:
    """Return the hash of the rubric and the model that applies it."""
    return content_id(RUBRIC_SHA, model)


def rule(game: Game, reply: Reply, prices: Prices) -> Ruling:
    """Return the ruling in a reply on a game; a failed or unreadable reply is unscored with its reason."""
    settled = settle(game)
    if settled:
        return settled
    if reply.error:
        return Ruling(None, unscored=f"no reply: {reply.error}")
    completion = read_completion(reply.body)
    facts: dict[str, Any] = {
        "raw": reply.body,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "cost_usd": prices.cost(completion.prompt_tokens, completion.completion_tokens),
    }
    if completion.problem:
        return Ruling(None, unscored=completion.problem, **facts)
    opinion = read_opinion(completion.text, swapped=game.swapped)
    winner = game.side(opinion.winner) if opinion.winner else None
    return Ruling(winner, opinion.explanation, opinion.unscored, **facts)


class Endpoint:
    """Sends requests, at most `max_concurrency` at once, the first one alone.

    The client retries 408, 409, 429, 5xx and lost connections with exponential backoff and waits as long as a
    Retry-After header asks (up to two minutes). A fatal answer stops all calls that have not been sent.

    Args:
        base_url: None is the provider's default.
        api_key: never written anywhere.
    """

    def __init__(self, *, base_url: str | None, api_key: SecretStr, max_concurrency: int, max_retries: int, timeout_s: float):
        from openai import AsyncOpenAI

        self._client = AsyncOpenAI(api_key=api_key.get_secret_value(), base_url=base_url, max_retries=max_retries, timeout=timeout_s)
        self._slots = asyncio.Semaphore(max_concurrency)
        self._first = asyncio.Lock()
        self._is_proven = False
        self._stopped_by = ""

    async def ask(self, request: Request) -> Reply:
        """Return the reply to one request; never raises for what the endpoint does."""
        async with self._first:
            if not self._is_proven and not self._stopped_by:
                return await self._send(request)
        async with self._slots:
            return await self._send(request)

    async def _send(self, request: Request) -> Reply:
        from openai import OpenAIError

        if self._stopped_by:
            return Reply("", 0.0, f"{UNSENT}: {self._stopped_by}", fatal=True)
        began = time.monotonic()
        try:
            response = await self._client.chat.completions.with_raw_response.create(**request)
        except OpenAIError as error:
            return self._failure(error, time.monotonic() - began)
        self._is_proven = True
        return Reply(response.text, time.monotonic() - began)

    def _failure(self, error: "OpenAIError", seconds: float) -> Reply:
        from openai import APIConnectionError, AuthenticationError, NotFoundError, PermissionDeniedError

        is_nobody_there = isinstance(error, APIConnectionError) and not self._is_proven
        is_refused = isinstance(error, AuthenticationError | PermissionDeniedError | NotFoundError)
        is_fatal = is_nobody_there or is_refused or getattr(error, "code", None) == "insufficient_quota"
        text = " ".join(str(error).split())[:300]
        if is_fatal:
            self._stopped_by = text
        else:
            self._is_proven = True  # it answers: the next calls need not wait for each other
        return Reply("", seconds, text, is_fatal)
