"""A language model as judge: which calls it takes, and what its replies say."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from ray_jobs.core.records import content_id
from ray_jobs.core.storage import Storage
from ray_jobs.judging.calls import Asked, Call, Prices, Reply, make_call
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.pairs import NOT_ASKED, Game, Ruling, repeated, settle, verdict_row
from ray_jobs.judging.parse import Completion, read_completion, read_opinion
from ray_jobs.judging.prices import FREE, prices_of
from ray_jobs.judging.rubric import RUBRIC, SCHEMA, Rubric, is_shortened

Row = dict[str, Any]
LOCAL = "local:"


class ModelJudge(NamedTuple):
    """One language model as judge.

    Attributes:
        name: in the config.
        model: as its endpoint knows it; for a local one, the name in the config.
        place: where it answers, "" for the provider's default: the same name elsewhere is another judge.
        max_tokens: longest reply.
        structured: send the JSON schema of the reply; without, the rubric's words alone ask for it.
        repeats: how often each order is asked.
    """

    name: str
    model: str
    place: str
    max_tokens: int
    structured: bool
    prices: Prices
    seed: int
    repeats: int = 1
    rubric: Rubric = RUBRIC

    @classmethod
    def of(cls, name: str, section: Mapping[str, Any], *, seed: int, repeats: int, rubric: Rubric, identity: str = "") -> Self:
        """Return the judge of a config's table.

        Args:
            section: fields of [judge.openai] or [judge.jury.NAME].
            identity: of a local model, a hash of its files: the same name may hold other weights tomorrow.
        """
        local, base_url = section["local"], section["base_url"]
        given = {"prompt": section["usd_per_million_prompt_tokens"], "completion": section["usd_per_million_completion_tokens"]}
        return cls(
            name=name,
            model=local or section["model"],
            place=f"{LOCAL}{identity}" if local else base_url or "",
            max_tokens=section["max_tokens"],
            structured=section["structured"] and not local,
            prices=FREE if local else prices_of(section["model"], base_url=base_url, **given),
            seed=seed,
            repeats=repeats,
            rubric=rubric,
        )

    @property
    def label(self) -> str:
        """The judge in the rows."""
        return f"{self.name}:{self.model}"

    @property
    def rubric_sha(self) -> str:
        """The hash of the rubric and the model that applies it."""
        return content_id(self.rubric.sha, self.model)

    @property
    def is_local(self) -> bool:
        """Whether it is a model of our own."""
        return self.place.startswith(LOCAL)

    def ledger(self, replies: Storage) -> Ledger:
        """Return what keeps its replies; those of a model of our own lie apart, as what costs nothing counts against no budget."""
        return Ledger(replies.sub("local") if self.is_local else replies)

    def games(self, games: Iterable[Game]) -> list[Game]:
        """Return the games as often as this judge is asked."""
        return repeated(games, self.repeats)

    def calls(self, games: Iterable[Game]) -> dict[Game, Call]:
        """Return the call that each game needs; games that a rule settles need none."""
        return {game: self._call(game) for game in games if settle(game) is None}

    def _call(self, game: Game) -> Call:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": self.rubric.messages(game.question, game.reference, *game.shown),
            "temperature": 0.0,
            "seed": self.seed + game.repeat,
            "max_tokens": self.max_tokens,
        }
        if self.structured:
            schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return make_call(request, base_url=self.place, swapped=game.swapped, repeat=game.repeat)

    @property
    def facts(self) -> Row:
        """What the manifest says about the judge."""
        base_url = None if self.is_local else self.place or None
        told = {"model": self.model, "place": self.place, "base_url": base_url}
        return {**told, "rubric_sha": self.rubric_sha, "repeats": self.repeats}

    def verdicts(self, rulings: Mapping[Game, Ruling]) -> list[Row]:
        """Return the Verdict row of each game."""
        return [verdict_row(game, ruling, judge=self.label, rubric_sha=self.rubric_sha) for game, ruling in rulings.items()]

    def rulings(self, games: Iterable[Game], calls: Mapping[Game, Call], asked: Asked) -> dict[Game, Ruling]:
        """Return the ruling on each game: by rule, from the reply to its call, or unscored as it was not asked."""
        return {game: settle(game) or self._rule(game, asked.replies.get(calls[game].key), asked.stopped) for game in games}

    def _rule(self, game: Game, reply: Reply | None, stopped: str) -> Ruling:
        return Ruling(None, unscored=f"{NOT_ASKED}{stopped}") if reply is None else rule(game, reply, self.prices)


def in_turn(games: Iterable[Game], *, seed: int) -> list[Game]:
    """Return the games in the order in which they are asked: repeat by repeat, questions shuffled, the orders of one together.

    Whatever a stop leaves is a random part of the questions, so that its figures speak of all.
    """
    return sorted(games, key=lambda game: (game.repeat, content_id(seed, game.question_id)))


def rule(game: Game, reply: Reply, prices: Prices) -> Ruling:
    """Return the ruling on a game from the reply to its call; unscored with a reason where it fails."""
    completion = Completion() if reply.error else read_completion(reply.body)
    tokens = (reply.prompt_tokens or completion.prompt_tokens, reply.completion_tokens or completion.completion_tokens)
    facts: dict[str, Any] = {
        "raw": reply.body,
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "cost_usd": prices.cost(*tokens) if reply.usd is None else reply.usd,
    }
    if reply.error:
        return Ruling(None, unscored=f"no reply: {reply.error}", **facts)
    if completion.problem:
        return Ruling(None, unscored=completion.problem, **facts)
    opinion = read_opinion(completion.text, swapped=game.swapped)
    winner = game.side(opinion.winner) if opinion.winner else None
    flags = [opinion.flag, *_shortened(game)] if winner else []
    return Ruling(winner, opinion.explanation, opinion.unscored, flag="; ".join(filter(None, flags)), **facts)


def _shortened(game: Game) -> list[str]:
    sides = (("1", game.text_a), ("2", game.text_b))
    return [f"answer {side} was too long and shown in part" for side, text in sides if is_shortened(text)]
