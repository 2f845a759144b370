"""A language model as judge: which calls it takes, and what its replies say."""

from collections.abc import Iterable
from typing import Any

from ray_jobs.core.records import content_id
from ray_jobs.judging.calls import Call, Prices, Reply, make_call
from ray_jobs.judging.pairs import Game, Ruling, settle
from ray_jobs.judging.parse import read_completion, read_opinion
from ray_jobs.judging.rubric import RUBRIC_SHA, SCHEMA, messages


def make_calls(
    games: Iterable[Game], *, model: str, base_url: str | None, max_tokens: int, seed: int, structured: bool
) -> dict[Game, Call]:
    """Return the call that each game needs; games that a rule settles need none.

    Args:
        base_url: where the model answers: the same name elsewhere is another judge.
        structured: send the JSON schema of the reply; without, the rubric's words alone ask for it.
    """
    calls = {}
    for game in games:
        if settle(game) is None:
            request = _request(game, model=model, max_tokens=max_tokens, seed=seed, structured=structured)
            calls[game] = make_call(request, base_url=base_url, swapped=game.swapped)
    return calls


def _request(game: Game, *, model: str, max_tokens: int, seed: int, structured: bool) -> dict[str, Any]:
    request: dict[str, Any] = {
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


def rubric_sha(model: str) -> str:
    """Return the hash of the rubric and the model that applies it."""
    return content_id(RUBRIC_SHA, model)


def rule(game: Game, reply: Reply | None, prices: Prices) -> Ruling:
    """Return the ruling on a game: by rule, or from the reply to its call; unscored with a reason where it fails.

    Args:
        reply: None for a game that needed no call.
    """
    if reply is None:
        return settle(game) or Ruling(None, unscored="never asked")
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
