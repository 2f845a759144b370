"""One call from send to send: what it has cost so far, and whether it is done, asked again, or given up."""

import random
from typing import Any, NamedTuple, Self

from ray_jobs.judging.calls import EndpointOptions, Prices, Reply
from ray_jobs.judging.endpoint import Outcome, count_tokens, most_completion_tokens, most_prompt_tokens
from ray_jobs.judging.ledger import Intent
from ray_jobs.judging.limiter import Ask, Grant, Report

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0
CUT_FACTOR = 2
"""A reply that was cut is asked for once more with so many times the tokens."""
MOST_REFUSALS = 20
"""Of one call: beyond, it is the call that does not fit, not the pace."""
MOST_PAID_FOR_NOTHING = 1
"""Replies to one call that were billed and hold no completion: beyond, the endpoint means it, and each more is paid again."""


class Tries(NamedTuple):
    """What one call has been through.

    Args:
        request: to be sent next.
        billed: sends that were billed, or may have been.
        intended: sends that the ledger says.
        doubtful: those of `billed` without an answer: nobody knows whether they were.
        for_nothing: answers that were billed and hold nothing.
        failures: sends that failed.
        refusals: sends refused for pace.
        cut: a reply that ended at its limit of tokens; the request is of a longer one since.
        prompt_tokens: billed for sure.
        completion_tokens: as `prompt_tokens`.
    """

    request: dict[str, Any]
    billed: int
    intended: int
    doubtful: int
    for_nothing: int = 0
    failures: int = 0
    refusals: int = 0
    cut: Outcome | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, request: dict[str, Any], before: Intent) -> Self:
        """Return those of a request that was, or was not, sent by somebody who kept no reply."""
        return cls(request, before.sends, before.sends, before.sends)

    def ask(self, prices: Prices) -> Ask:
        """Return the question for a moment to send at."""
        is_again = self.failures + self.refusals > 0 or self.cut is not None
        return Ask(count_tokens(self.request), most_completion_tokens(self.request), self._worst_usd(prices) or 0.0, is_again)

    def intent(self, sends: int, prices: Prices) -> Intent:
        """Return what the ledger is to say: so many sends may be billed, each at most like the next one."""
        return Intent(sends, most_prompt_tokens(self.request), most_completion_tokens(self.request), self._worst_usd(prices))

    def reply(self, outcome: Outcome, prices: Prices) -> Reply:
        """Return the reply that the last send came to, with the cost of all; one that was cut where no longer one came."""
        found = outcome if self.cut is None or outcome.kind in {"ok", "cut"} else self.cut
        tokens = (self.prompt_tokens, self.completion_tokens)
        usd = prices.cost(*tokens) if sum(tokens) else 0.0
        may_pass = found.kind == "failed" and not self.for_nothing
        return Reply(found.body, found.seconds, found.error, *tokens, found.is_estimated, found.model, usd, self.doubtful, may_pass)

    def _worst_usd(self, prices: Prices) -> float | None:
        return prices.cost(most_prompt_tokens(self.request), most_completion_tokens(self.request))


class Step(NamedTuple):
    """What follows from a send: the limiter is told, and where the report is of neither ok nor gave_up the call asks again."""

    report: Report
    tries: Tries
    wait_s: float = 0.0


def read_outcome(outcome: Outcome, ask: Ask, grant: Grant, tries: Tries, *, prices: Prices, options: EndpointOptions) -> Step:
    """Return what follows from what one send came to."""
    is_billed = outcome.prompt_tokens + outcome.completion_tokens > 0
    report = _report(outcome, ask, grant, tries, usd=prices.cost(outcome.prompt_tokens, outcome.completion_tokens) if is_billed else 0.0)
    tries = tries._replace(
        billed=tries.billed + (is_billed or outcome.may_be_billed),
        doubtful=tries.doubtful + outcome.may_be_billed,
        prompt_tokens=tries.prompt_tokens + outcome.prompt_tokens,
        completion_tokens=tries.completion_tokens + outcome.completion_tokens,
    )
    if outcome.kind == "cut" and options.repeats_cut and tries.cut is None:
        return Step(report._replace(result="failed", retry=True), tries._replace(request=_longer(tries.request), cut=outcome))
    if outcome.kind == "refused":
        tries = tries._replace(refusals=tries.refusals + 1)
        return Step(report._replace(result="refused" if tries.refusals <= MOST_REFUSALS else "gave_up"), tries)
    if outcome.kind == "failed":
        tries = tries._replace(failures=tries.failures + 1, for_nothing=tries.for_nothing + is_billed)
        if tries.failures <= options.max_retries and tries.for_nothing <= MOST_PAID_FOR_NOTHING:
            return Step(report._replace(result="failed", retry=True), tries, _backoff(tries.failures, outcome.told.wait_s))
    if outcome.kind in {"failed", "row", "fatal"}:
        return Step(report._replace(result="gave_up", stop=outcome.error if outcome.kind == "fatal" else ""), tries)
    return Step(report, tries)


def _report(outcome: Outcome, ask: Ask, grant: Grant, tries: Tries, *, usd: float | None) -> Report:
    return Report(
        "ok",
        ask,
        grant,
        outcome.prompt_tokens,
        outcome.completion_tokens,
        is_estimated=outcome.is_estimated,
        usd=usd,
        may_be_billed=outcome.may_be_billed,
        is_doubtful=tries.doubtful > 0,
        wait_s=outcome.told.wait_s,
        requests_per_minute=outcome.told.requests_per_minute,
        tokens_per_minute=outcome.told.tokens_per_minute,
        error=outcome.error,
        is_unreachable=outcome.is_unreachable,
        is_of_row=outcome.is_of_row,
    )


def _longer(request: dict[str, Any]) -> dict[str, Any]:
    named = {name: CUT_FACTOR * request[name] for name in ("max_tokens", "max_completion_tokens") if request.get(name)}
    return {**request, **named}


def _backoff(failures: int, told_s: float | None) -> float:
    if told_s is not None:
        return min(told_s, LONGEST_BACKOFF_S)
    return min(FIRST_BACKOFF_S * 2.0 ** (failures - 1), LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
