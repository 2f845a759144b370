"""One request to an OpenAI-compatible endpoint through the official client, and what its answer means for the next ones."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ray_jobs.judging.calls import EndpointOptions
from ray_jobs.judging.headers import Told, read_headers
from ray_jobs.judging.parse import UNREADABLE, text_of, well_formed

if TYPE_CHECKING:
    from openai import APIStatusError

CHARS_PER_TOKEN = 4
LONGEST_ERROR = 300
"""Characters; some endpoints send a page."""
MESSAGE_TOKENS = 4
"""What a message costs beside its text, about."""
Kind = Literal["ok", "cut", "refused", "failed", "row", "fatal"]
_AGAIN = {408, 409, 425}
_FATAL = {401, 403, 404}
_NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
_GATEWAY_TIMEOUTS = {504, 524}
_OF_THE_ROW = ("content_filter", "context_length", "string_above_max", "content_policy", "moderation")


class Outcome(NamedTuple):
    """What one request came to.

    Args:
        kind: ok; cut, a reply that ends at its limit of tokens; refused for pace; failed, to be sent again; row, of no use to
            send again; fatal, and so would every other request.
        may_be_billed: no reply came, but the endpoint may have made one.
        is_of_row: the text itself is refused: the same endpoint answers others.
        is_unreachable: there was no connection at all.
    """

    kind: Kind
    body: str = ""
    seconds: float = 0.0
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_estimated: bool = False
    model: str = ""
    may_be_billed: bool = False
    is_of_row: bool = False
    is_unreachable: bool = False
    told: Told = Told()


def count_tokens(request: Mapping[str, Any]) -> int:
    """Return about how many tokens a request's prompt has, schema included; the limiter learns how far that is off."""
    return prompt_chars(request) // CHARS_PER_TOKEN + MESSAGE_TOKENS * len(request["messages"])


def most_prompt_tokens(request: Mapping[str, Any]) -> int:
    """Return how many tokens a request's prompt can have: no tokenizer makes more than one of a byte."""
    size = len(json.dumps([request["messages"], request.get("response_format")], ensure_ascii=False).encode())
    return size + MESSAGE_TOKENS * len(request["messages"])


def most_completion_tokens(request: Mapping[str, Any]) -> int:
    """Return the reply's limit; 0 where the request sets none."""
    return int(request.get("max_tokens") or request.get("max_completion_tokens") or 0)


def prompt_chars(request: Mapping[str, Any]) -> int:
    """Return the characters of all messages and of the schema, which is read as they are."""
    texts = [message["content"] for message in request["messages"]] + [request.get("response_format") or ""]
    return sum(len(text if isinstance(text, str) else json.dumps(text)) for text in texts)


class Endpoint:
    """Sends requests. It never sends one again by itself: every send needs its moment from the limiter."""

    def __init__(self, options: EndpointOptions):
        from openai import AsyncOpenAI

        key = options.api_key.get_secret_value()
        self._client = AsyncOpenAI(api_key=key, base_url=options.base_url, max_retries=0, timeout=options.timeout_s)
        self._options, self._is_proven = options, False

    async def send(self, request: dict[str, Any]) -> Outcome:
        """Return what one request came to; never raises for what the endpoint does."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        began = time.monotonic()
        try:
            async with asyncio.timeout(self._options.timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(**request)
                found = read_reply(response.text, request)._replace(told=read_headers(response.headers))
        except TimeoutError:
            found = Outcome("failed", error=f"no reply within {self._options.timeout_s:g} s", may_be_billed=True)
        except APIConnectionError as error:
            found = _lost(error, self._options.timeout_s)
        except APIStatusError as error:
            found = self._refused(error)
        except OpenAIError as error:
            found = Outcome("failed", error=str(error))
        self._is_proven = self._is_proven or found.kind in {"ok", "cut"}
        return found._replace(seconds=time.monotonic() - began, error=sayable(found.error, self._options))

    def _refused(self, error: "APIStatusError") -> Outcome:
        body = error.body if isinstance(error.body, dict) else {}
        text = f"Error code: {error.status_code} - {body.get('message') or error.message}"
        found = read_status(error.status_code, str(error.code or body.get("type") or ""), text, is_proven=self._is_proven)
        return found._replace(told=read_headers(error.response.headers))


def sayable(error: str, options: EndpointOptions) -> str:
    """Return an endpoint's error as one line without the key, which goes before the cut: after it, a part could stay."""
    masked = well_formed(error).replace(options.api_key.get_secret_value(), "***")
    return " ".join(masked.split())[:LONGEST_ERROR]


def read_status(status: int, code: str, text: str, *, is_proven: bool) -> Outcome:
    """Return what an error means.

    Args:
        is_proven: the endpoint has answered before, so that a 403 is about this text, not about the key, whatever it says.
    """
    is_of_row = any(word in f"{code} {text}".lower() for word in _OF_THE_ROW)
    if code == "insufficient_quota":
        return Outcome("fatal", error=text)
    if status == 429:
        return Outcome("refused", error=text)
    if status in _AGAIN or status >= 500:
        return Outcome("failed", error=text, may_be_billed=status in _GATEWAY_TIMEOUTS)
    if status in _FATAL and not (status == 403 and (is_proven or is_of_row)):
        return Outcome("fatal", error=text)
    return Outcome("row", error=text, is_of_row=is_of_row)


def read_reply(body: str, request: Mapping[str, Any]) -> Outcome:
    """Return what a reply of status 200 holds: a completion, an error all the same, or a proxy's page."""
    usage = (0, 0)
    try:
        found = json.loads(body)
        if isinstance(found.get("error"), dict):
            error = found["error"]
            code = error.get("code")
            status = code if isinstance(code, int) else 500
            return read_status(status, str(code), f"status 200 with an error: {error.get('message')}", is_proven=True)
        model, usage, choice = well_formed(str(found.get("model") or "")), _usage(found), (found.get("choices") or [None])[0]
        if choice is None:
            return Outcome("failed", error=f"the reply has no choices: {body[:80]!r}", prompt_tokens=usage[0], completion_tokens=usage[1])
        text = text_of(choice["message"])
    except UNREADABLE:
        error = f"the reply is no chat completion: {body[:80]!r}"
        return Outcome("failed", error=error, prompt_tokens=usage[0], completion_tokens=usage[1])
    is_estimated = not any(usage)
    prompt, completion = (count_tokens(request), len(text) // CHARS_PER_TOKEN + 1) if is_estimated else usage
    kind: Kind = "cut" if choice.get("finish_reason") == "length" else "ok"
    return Outcome(kind, body, 0.0, "", prompt, completion, is_estimated, model)


def _usage(found: Mapping[str, Any]) -> tuple[int, int]:
    usage = found.get("usage") or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def _lost(error: Exception, timeout_s: float) -> Outcome:
    """A connection that was never made costs nothing; one lost after the request was sent may."""
    from openai import APITimeoutError

    cause = error.__cause__ or error
    names = {kind.__name__ for kind in type(cause).__mro__}  # of the HTTP library under the client, which changes between its versions
    if names & _NEVER_SENT:
        return Outcome("failed", error=f"Connection error: {cause or type(cause).__name__}", is_unreachable=True)
    if isinstance(error, APITimeoutError):
        return Outcome("failed", error=f"no reply within {timeout_s:g} s", may_be_billed=True)
    return Outcome("failed", error=f"Connection error: {cause}", may_be_billed=True)
