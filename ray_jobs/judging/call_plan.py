"""What a language-model judge will cost: calls, tokens, dollars and minutes, before one call is sent. No network."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ray_jobs.judging.batch import HALF
from ray_jobs.judging.calls import Call
from ray_jobs.judging.canaries import Canary
from ray_jobs.judging.endpoint import prompt_chars
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.openai_judge import ModelJudge
from ray_jobs.judging.pairs import Game, make_games
from ray_jobs.judging.prices import FREE

Row = dict[str, Any]
CHARS_PER_TOKEN = (5.0, 3.0)
"""Most and fewest: English prose has four to five characters a token, German, code and lists nearer three."""
LEAST_REPLY_TOKENS = 60
"""Two short sentences and four empty lists."""


class Range(NamedTuple):
    """The least and the most of something."""

    low: float
    high: float


class CallPlan(NamedTuple):
    """What one judge still has to be asked.

    Attributes:
        calls: not answered yet; an upper bound where `is_exact` is false, as rules settle equal and empty answers.
        answered: calls that the ledger has the reply to: they cost nothing.
        prompt_tokens: with the schema, each call sent once; so are completion_tokens: a reply that is cut is asked for again.
        usd: None where a price is unknown, unless there is no call left to pay.
        minutes: at the given limits; None where the pace is learned from the endpoint, or none is kept.
        place: who answers: an endpoint by calls or by batch, or the cluster.
    """

    judge: str
    calls: int
    answered: int
    canaries: int
    is_exact: bool
    prompt_tokens: Range
    completion_tokens: Range
    usd: Range | None
    minutes: float | None
    place: Literal["calls", "batch", "cluster"] = "calls"


def games_to_plan(questions: Sequence[Row], answers: Mapping[str, list[Row]] | None, pairs: Sequence[tuple[str, str]]) -> list[Game]:
    """Return the games of a run; where there are no answers yet, each model's answer is its name."""
    if answers is None:
        blank = {"answer_id": "", "finish_reason": "stop"}
        models = {model for pair in pairs for model in pair}
        answers = {
            model: [{**blank, "question_id": row["question_id"], "model": model, "text": model} for row in questions] for model in models
        }
    return make_games(list(questions), dict(answers), pairs)


def plan_calls(
    judge: ModelJudge,
    *,
    games: Sequence[Game],
    canaries: Sequence[Canary],
    ledger: Ledger,
    missing_answer_tokens: int,
    requests_per_minute: float | None,
    tokens_per_minute: float | None,
    backend: Literal["calls", "batch"] = "calls",
) -> CallPlan:
    """Return what a judge costs.

    Args:
        games: as `games_to_plan` has them.
        ledger: what is paid for already.
        missing_answer_tokens: most tokens of an answer that is not there yet; 0 where all are.
        requests_per_minute: limit of the provider, where it is given.
        tokens_per_minute: as `requests_per_minute`.
        backend: calls, or batch, which takes half the price.
    """
    played, planted = judge.calls(judge.games(games)), judge.calls(canary.game for canary in canaries)
    calls = {call.key: call for call in [*planted.values(), *played.values()]}
    kept = ledger.replies(calls)
    new = [call for key, call in calls.items() if key not in kept]
    not_planted = sum(call.key not in kept for call in played.values())
    prompt = _prompt_tokens(new, 2 * missing_answer_tokens * not_planted)
    completion = Range(len(new) * min(LEAST_REPLY_TOKENS, judge.max_tokens), len(new) * judge.max_tokens)
    place: Literal["calls", "batch", "cluster"] = "cluster" if judge.is_local else backend
    share = HALF if place == "batch" else 1.0
    prices = judge.prices if new else FREE
    costs = [prices.cost(round(read), round(written)) for read, written in zip(prompt, completion, strict=True)]
    return CallPlan(
        judge=judge.label,
        calls=len(new),
        answered=len(kept),
        canaries=len(planted),
        is_exact=not missing_answer_tokens,
        prompt_tokens=prompt,
        completion_tokens=completion,
        usd=None if costs[0] is None or costs[1] is None else Range(share * costs[0], share * costs[1]),
        minutes=None if place != "calls" else _minutes(len(new), prompt.high + completion.high, requests_per_minute, tokens_per_minute),
        place=place,
    )


def _prompt_tokens(calls: Iterable[Call], missing_tokens: int) -> Range:
    chars = sum(prompt_chars(call.request) for call in calls)
    return Range(chars / CHARS_PER_TOKEN[0], chars / CHARS_PER_TOKEN[1] + missing_tokens)


def _minutes(calls: int, tokens: float, requests_per_minute: float | None, tokens_per_minute: float | None) -> float | None:
    given = [amount / limit for amount, limit in ((calls, requests_per_minute), (tokens, tokens_per_minute)) if limit]
    return max(given) if given else None


def in_words(plan: CallPlan) -> list[str]:
    """Return the lines that say it."""
    bound = "" if plan.is_exact else " at most, as equal and empty answers need none"
    lines = [f"judge {plan.judge}: {plan.calls} calls{bound} ({plan.canaries} of all are canaries); {plan.answered} are answered already"]
    if not plan.calls:
        return [f"{lines[0]}; nothing is left to pay"]
    tokens = [f"{low:,.0f} to {high:,.0f}" for low, high in (plan.prompt_tokens, plan.completion_tokens)]
    cost = "unknown price: set usd_per_million_prompt_tokens and usd_per_million_completion_tokens"
    if plan.usd is not None:
        cost = f"{plan.usd.low:.2f} to {plan.usd.high:.2f} USD"
    pace = "the pace is learned from the endpoint" if plan.minutes is None else f"{plan.minutes:.1f} minutes at the limit"
    if plan.place == "batch":
        pace = "up to a day, by the provider's batches"
    if plan.place == "cluster":
        cost, pace = "no price", "made in the cluster"
    estimated = "estimated from characters, without replies that are cut"
    return [*lines, f"  {tokens[0]} tokens read, {tokens[1]} written ({estimated}); {cost}; {pace}"]
