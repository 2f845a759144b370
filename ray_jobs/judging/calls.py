"""The words that asking an endpoint is made of: a call, its reply, where it goes, what limits it, what it cost."""

from typing import Any, Literal, NamedTuple

from pydantic import SecretStr

from ray_jobs.core.records import content_id

PER_MILLION = 1e6


class Call(NamedTuple):
    """The body of one request, and the hash under which its reply is kept."""

    key: str
    request: dict[str, Any]


def make_call(request: dict[str, Any], *, base_url: str | None, swapped: bool = False, repeat: int = 0) -> Call:
    """Return the call of a request; whatever could change the reply is in its key.

    Args:
        request: model, messages, decoding and schema.
        base_url: where the model answers: the same name elsewhere is another judge.
        swapped: the order of the answers in the messages.
        repeat: equal questions that are to be answered anew have different numbers.
    """
    return Call(content_id(base_url or "", request, swapped, repeat), request)


class Reply(NamedTuple):
    """The raw body of a reply, or the error that came instead.

    Args:
        body: what the endpoint sent, unread; empty where nothing usable came.
        seconds: from sending to reply, without waiting for the limit.
        error: why there is no body to read.
        prompt_tokens: billed for all sends of this call.
        completion_tokens: as `prompt_tokens`.
        is_estimated: the endpoint told no usage; the tokens are an own count.
        model: name of the model that says it answered.
        usd: cost of these tokens at the prices of that day; None where a price is unknown.
        doubtful: sends before this one that may have been billed without an answer; the tokens above are without them.
        may_pass: it was given up for a reason of the endpoint's, not of its text: asked another time it may be answered.
    """

    body: str
    seconds: float
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_estimated: bool = False
    model: str = ""
    usd: float | None = None
    doubtful: int = 0
    may_pass: bool = False


class EndpointOptions(NamedTuple):
    """Where calls go, and how patiently.

    Args:
        api_key: from the environment; never written anywhere.
        base_url: None is the provider's default.
        timeout_s: longest wait for one reply.
        max_retries: of one call after 408, 409, 5xx, a lost connection or a reply that is none.
        repeats_cut: a reply that was cut at its limit of tokens is asked for once more, with twice the tokens.
        backend: calls asks one by one; batch hands all to the provider's batch endpoint.
    """

    api_key: SecretStr
    base_url: str | None = None
    timeout_s: float = 120.0
    max_retries: int = 6
    backend: Literal["calls", "batch"] = "calls"
    repeats_cut: bool = True


class Limits(NamedTuple):
    """What the provider allows to all callers together; None learns it from headers and refusals.

    Args:
        tokens_per_minute: prompt and reply together.
        max_concurrency: calls in flight, at most; the pace below it follows the limit.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrency: int = 256


class Budget(NamedTuple):
    """The most that may be spent, with what the ledger says was spent before: no call is sent that could pass it."""

    usd: float | None = None
    calls: int | None = None


class Prices(NamedTuple):
    """US dollars for a million tokens; None where unknown."""

    prompt: float | None = None
    completion: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return the price of one call in US dollars; None unless both prices are known."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / PER_MILLION


class Counters(NamedTuple):
    """What became of the calls of one `ask`.

    planned = cached + ok + unscored + those never asked (see Asked.stopped).

    Args:
        planned: different calls.
        cached: answered by the ledger.
        sent: requests that left, repeated ones too.
        ok: calls with a reply.
        prompt_tokens: billed, of all requests.
        completion_tokens: as `prompt_tokens`.
        estimated: replies without usage, whose tokens are an own count.
        rate_limited: requests refused for pace (429).
        retries: requests sent again for any other reason.
        unscored: calls given up, each with its error.
        paid_twice: replies to calls that the ledger had an answer to by then.
        possibly_paid_twice: requests sent again although the first may have been billed: it timed out, or its sender died.
        usd: cost of the tokens above; None where a price is unknown.
        ignored_files: files of the ledger that are torn or of an older schema.
    """

    planned: int = 0
    cached: int = 0
    sent: int = 0
    ok: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0
    rate_limited: int = 0
    retries: int = 0
    unscored: int = 0
    paid_twice: int = 0
    possibly_paid_twice: int = 0
    usd: float | None = None
    ignored_files: int = 0


class Asked(NamedTuple):
    """The replies by key, and how it went.

    Args:
        replies: of calls that were asked, now or before; one that was given up has an error, one never asked is missing.
        stopped: why not all were asked (the budget is spent, the endpoint wants an hour's pause ...); the same `ask` goes on.
        models: replies by the name of the model that says it answered: more than one means that an alias moved in mid-run.
    """

    replies: dict[str, Reply]
    counters: Counters
    stopped: str = ""
    models: dict[str, int] = {}  # noqa: RUF012
