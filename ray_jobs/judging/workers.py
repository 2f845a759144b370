"""What an actor of the coverage judge holds: the sentence encoder, loaded once, and the batches it works on."""

from typing import Any

from ray_jobs.core.models import resolve_model
from ray_jobs.judging.coverage import CoverageJudge, rubric_sha
from ray_jobs.judging.encoder import SentenceEncoder
from ray_jobs.judging.pairs import Game, verdict_row

Row = dict[str, Any]


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
        return {"verdicts": [verdict_row(game, ruling, judge="coverage", rubric_sha=self._rubric_sha) for game, ruling in ruled]}
