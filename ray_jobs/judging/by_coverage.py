"""The offline judge over a cluster: batches of games, and what the actors that work on them hold."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray_jobs.core.models import resolve_model
from ray_jobs.core.progress import OnProgress
from ray_jobs.core.records import OFFLINE
from ray_jobs.judging.coverage import CoverageJudge, rubric_sha
from ray_jobs.judging.encoder import SentenceEncoder
from ray_jobs.judging.judged import Judged
from ray_jobs.judging.pairs import Game, verdict_row

Row = dict[str, Any]
GAMES_PER_BATCH = 32


def judge_by_coverage(games: Sequence[Game], *, model: str, work: Callable[[list[Row]], Iterator[Row]], on_progress: OnProgress) -> Judged:
    """Return what the offline judge says of the games, in their order.

    Args:
        model: name of the sentence encoder.
        work: gives batches of games to CoverageWorkers, and yields what they return, in any order.
        on_progress: called after each batch.
    """
    batches = [{"games": [game._asdict() for game in games[i : i + GAMES_PER_BATCH]]} for i in range(0, len(games), GAMES_PER_BATCH)]
    rows: list[Row] = []
    for result in work(batches):
        rows += result["verdicts"]
        on_progress(len(rows), len(games), "")
    place = {(game.question_id, game.model_a, game.model_b, game.swapped): i for i, game in enumerate(games)}
    rows.sort(key=lambda row: place[row["question_id"], row["model_a"], row["model_b"], row["swapped"]])
    return Judged(OFFLINE, rows, {"model": model, "rubric_sha": rows[0]["rubric_sha"] if rows else None})


class CoverageWorker:
    """Judges games by covered statements.

    Args:
        model: name of the sentence encoder, resolved on the worker's node.
        num_threads: torch threads.
        threshold: as in CoverageJudge.
        margin: as in CoverageJudge.
    """

    def __init__(self, *, model: str, num_threads: int, threshold: float, margin: float):
        encode = SentenceEncoder(resolve_model(model), num_threads=num_threads)
        self._judge = CoverageJudge(encode, threshold=threshold, margin=margin)
        self._rubric_sha = rubric_sha(model, threshold=threshold, margin=margin)

    def __call__(self, batch: Row) -> Row:
        """Return {"verdicts": Verdict rows} of {"games": Game rows}."""
        games = [Game(**row) for row in batch["games"]]
        ruled = zip(games, self._judge.judge(games), strict=True)
        return {"verdicts": [verdict_row(game, ruling, judge=OFFLINE, rubric_sha=self._rubric_sha) for game, ruling in ruled]}
