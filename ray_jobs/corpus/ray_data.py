"""The thin Ray layer of prepare, answer and judge: items through a pool of workers, results as they come."""

import functools
import json
from collections.abc import Iterator
from typing import Any

from ray_jobs.core import errors
from ray_jobs.core.cluster import RETRIES, name_lost_workers

MAX_BLOCKS = 1000
"""Blocks of the item list: one item each up to here, so that a slow file holds up no other."""


class _Worker:
    """Holds one worker object in an actor; items and results cross as JSON text.

    An error raised on purpose crosses as a result: Ray would wrap it in its own, and try again what cannot work.
    """

    def __init__(self, kind: type, arguments: dict[str, Any]):
        self._make = functools.cache(functools.partial(kind, **arguments))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self._outcome(json.loads(item))) for item in batch["item"]]}

    def _outcome(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"value": self._make()(item)}
        except errors.JobError as error:
            return {"error": type(error).__name__, "message": str(error)}


def each(
    items: list[dict[str, Any]], kind: type, arguments: dict[str, Any], *, bundle: dict[str, float], num_workers: int
) -> Iterator[dict[str, Any]]:
    """Yield `kind(**arguments)(item)` of each item, in the order in which they finish.

    Needs a connected cluster. A worker that dies is replaced a few times, and its items are done again.

    Args:
        kind: class of the workers; made once for each.
        bundle: what one worker takes, as Ray names it: "CPU", "GPU", "memory".
        num_workers: at most so many.

    Raises:
        JobError: as the first worker that raised one; or a worker died each time.
    """
    import ray

    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
        _Worker,
        batch_size=1,
        fn_constructor_args=(kind, arguments),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(num_workers, len(rows))),
        num_cpus=bundle.get("CPU", 1),
        num_gpus=bundle.get("GPU") or None,
        memory=bundle.get("memory") or None,
        **RETRIES,
    )
    with name_lost_workers(f"pool of {kind.__name__}"):
        for row in dataset.iter_rows():
            outcome = json.loads(row["result"])
            if "error" in outcome:
                raise getattr(errors, outcome["error"])(outcome["message"])
            yield outcome["value"]
