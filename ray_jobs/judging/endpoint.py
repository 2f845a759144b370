"""Requests to an OpenAI-compatible endpoint through the official client: how many at once, what stops them all."""

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import SecretStr

if TYPE_CHECKING:
    from openai import OpenAIError

UNSENT = "not asked, as an earlier call was refused"


class Reply(NamedTuple):
    """The raw body of a reply, or the error that came instead.

    `fatal` says that every other call would fail alike: wrong key, unknown model, no credit, nobody there.
    """

    body: str
    seconds: float
    error: str = ""
    fatal: bool = False


def why_stopped(replies: Iterable[Reply]) -> str:
    """Return why no call can succeed: the fatal error, or the first where all failed; empty where some did not."""
    found = list(replies)
    fatal = [reply.error for reply in found if reply.fatal and not reply.error.startswith(UNSENT)]
    if fatal:
        return fatal[0]
    return found[0].error if all(reply.error for reply in found) else ""


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
        self._api_key = api_key
        self._slots = asyncio.Semaphore(max_concurrency)
        self._first = asyncio.Lock()
        self._is_proven = False
        self._stopped_by = ""

    async def ask(self, request: dict[str, Any]) -> Reply:
        """Return the reply to one request; never raises for what the endpoint does."""
        async with self._first:
            if not self._is_proven and not self._stopped_by:
                return await self._send(request)
        async with self._slots:
            return await self._send(request)

    async def _send(self, request: dict[str, Any]) -> Reply:
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
        text = " ".join(str(error).split())[:300].replace(self._api_key.get_secret_value(), "***")
        if is_fatal:
            self._stopped_by = text
        else:
            self._is_proven = True  # it answers: the next calls need not wait for each other
        return Reply("", seconds, text, is_fatal)
