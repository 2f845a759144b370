"""A language model judges all games of a run: what a rule settles, what it is asked and in which order, what its replies say."""

from collections.abc import Callable, Sequence
from typing import Any

from ray_jobs.judging.calls import Asked, Call
from ray_jobs.judging.canaries import Canary, canary_rows
from ray_jobs.judging.judged import Judged, asked_share
from ray_jobs.judging.openai_judge import ModelJudge, in_turn
from ray_jobs.judging.pairs import Game

Ask = Callable[[list[Call]], Asked]


def judge_by_model(judge: ModelJudge, games: Sequence[Game], canaries: Sequence[Canary], *, ask: Ask) -> Judged:
    """Return what a language model says of the games, and whether it follows the canaries, which are asked first.

    Args:
        ask: gets the replies to calls, kept ones or new.
    """
    played, planted = judge.games(games), [canary.game for canary in canaries]
    calls = judge.calls([*played, *planted])
    asked = ask([calls[game] for game in [*planted, *in_turn(played, seed=judge.seed)] if game in calls])
    rows = judge.verdicts(judge.rulings(played, calls, asked))
    facts: dict[str, Any] = {
        **judge.facts,
        "settled_by_rule": len(played) + len(planted) - len(calls),
        "coverage": asked_share(rows),
        "flagged": sum(bool(row["flag"]) for row in rows),
        "stopped": asked.stopped,
        "given_up_for_now": sum(reply.may_pass for reply in asked.replies.values()),
        "answered_as": asked.models,
        "calls": asked.counters._asdict(),
    }
    found = canary_rows(canaries, judge.rulings(planted, calls, asked), judge=judge.label)
    return Judged(judge.label, rows, facts, found, is_model=True, stopped=asked.stopped)
