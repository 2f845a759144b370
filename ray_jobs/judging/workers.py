"""What an actor of the judging job holds: a judge that is loaded once, and the batches it works on.

A batch has one column, `row`: JSON, so that no column type is guessed from values that are all None.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ray_jobs.core.models import resolve_model
from ray_jobs.core.progress import OnProgress
from ray_jobs.judging.coverage import CoverageJudge, rubric_sha
from ray_jobs.judging.encoder import SentenceEncoder
from ray_jobs.judging.endpoint import Endpoint
from ray_jobs.judging.pairs import Game, verdict_row
from ray_jobs.judging.replies import Replies

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


class EndpointWorker:
    """Asks the endpoint, and keeps every reply before anybody reads it.

    Args:
        replies: where replies are kept.
        on_progress: told after each reply.
        total: calls in all.
        endpoint: arguments of Endpoint.
    """

    def __init__(self, *, replies: Replies, on_progress: OnProgress, total: int, **endpoint: Any):
        self._endpoint = Endpoint(**endpoint)
        self._replies = replies
        self._on_progress = on_progress
        self._num_done, self._total = 0, total

    async def __call__(self, table: "pa.Table") -> AsyncIterator[Batch]:
        """Yield rows of a key and a Reply, from Call rows."""
        calls = [json.loads(text) for text in table["row"].to_pylist()]
        found = await asyncio.gather(*(self._ask(**call) for call in calls))
        yield {"row": [json.dumps(row) for row in found]}

    async def _ask(self, *, key: str, request: dict[str, Any]) -> dict[str, Any]:
        # a lost actor's block is done again: what it had kept is not paid for twice
        reply = await asyncio.to_thread(self._replies.get, key)
        if reply is None:
            reply = await self._endpoint.ask(request)
            if not reply.error:
                await asyncio.to_thread(self._replies.put, key, reply)
        self._num_done += 1
        self._on_progress(self._num_done, self._total, "")
        return {"key": key, **reply._asdict()}
