"""What a loss may have beside being called: a word on the batches to come, batches of its own, a moment before each checkpoint, figures."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ray_jobs.training.batches import Batch, Row
from ray_jobs.training.losses import Loss


class LossHooks:
    """The methods of a loss that the loop calls where it has them.

    `check(model, rows, dtype)` may refuse before the first step, with the whole model and rows of that step;
    `announce(batches)` is told of each micro-batch once, `ahead` steps before it is asked for; `draw(model, batches, step=, seed=)`
    is given each step's micro-batches and returns as many that are trained on, and `draws(step)` says whether they are
    others: such a step is not announced; `flush()` comes before a checkpoint; `after_step(terms)` gets a step's means
    over all workers; `state()` is kept in checkpoints, and `load_state` gets it back where it is not empty; `counts()`
    returns what was done on this worker since it began: seconds (names in _s) and numbers by name; `facts()` what
    result.json says of the loss, on worker 0 at the end.
    """

    def __init__(self, loss: Loss):
        self.ahead: int = getattr(loss, "ahead", 0)
        self.announce: Callable[[list[Batch]], None] = getattr(loss, "announce", lambda batches: None)
        self.draws: Callable[[int], bool] = getattr(loss, "draws", lambda step: False)
        self.draw: Callable[..., list[Batch]] = getattr(loss, "draw", lambda model, batches, **place: batches)
        self.flush: Callable[[], None] = getattr(loss, "flush", lambda: None)
        self.check: Callable[[nn.Module, list[Row], torch.dtype], None] = getattr(loss, "check", lambda model, rows, dtype: None)
        self.after_step: Callable[[dict[str, float]], None] = getattr(loss, "after_step", lambda terms: None)
        self.state: Callable[[], dict[str, float]] = getattr(loss, "state", dict)
        self.load_state: Callable[[dict[str, float]], None] = getattr(loss, "load_state", lambda state: None)
        self.counts: Callable[[], dict[str, float]] = getattr(loss, "counts", dict)
        self.facts: Callable[[], dict[str, Any]] = getattr(loss, "facts", dict)

    def announced(self, groups: Iterable[list[Batch]], *, first_step: int | None = None) -> Iterator[list[Batch]]:
        """Yield the groups in order, each announced when the one `ahead` places before it is yielded.

        Args:
            first_step: of the first group, where groups are steps.
        """
        waiting: deque[list[Batch]] = deque()
        for place, group in enumerate(groups):
            if first_step is None or not self.draws(first_step + place):
                self.announce(group)
            waiting.append(group)
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting
