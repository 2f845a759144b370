"""What an actor of the judging job holds: a judge that is loaded once, and the batches it works on.

A batch has one column, `row`: JSON, so that no column type is guessed from values that are all None.
"""

import json
from typing import TYPE_CHECKING

from ray_jobs.core.models import resolve_model
from ray_jobs.judging.coverage import CoverageJudge, rubric_sha
from ray_jobs.judging.encoder import SentenceEncoder
from ray_jobs.judging.pairs import Game, verdict_row

if TYPE_CHECKING:
    import pyarrow as pa

Batch = dict[str, list[str]]


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

    def __call__(self, table: "pa.Table") -> Batch:
        """Return the Verdict rows of Game rows."""
        games = [Game(**json.loads(text)) for text in table["row"].to_pylist()]
        rulings = self._judge.judge(games)
        rows = [
            verdict_row(game, ruling, judge="coverage", rubric_sha=self._rubric_sha) for game, ruling in zip(games, rulings, strict=True)
        ]
        return {"row": [json.dumps(row) for row in rows]}
