"""Losses per token over micro-batches and workers, and the lines of metrics.jsonl."""

from collections.abc import Callable
from typing import Any

import torch

from ray_jobs.training.batches import Batch
from ray_jobs.training.checkpoint import Progress
from ray_jobs.training.losses import LossSums
from ray_jobs.training.ranks import sum_over_ranks

OnLog = Callable[[list[dict[str, Any]]], None]
"""Called with all lines logged so far."""


class Tally:
    """Sums of losses and of valid tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._label_tokens = 0

    def add(self, sums: LossSums, batch: Batch) -> None:
        """Add a micro-batch."""
        for name, value in {"": sums.total.detach(), **sums.terms}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._label_tokens += batch.num_valid

    def over_ranks(self, device: torch.device) -> dict[str, Any]:
        """Return `loss` and `terms` in nats per valid token, and `label_tokens`, over all workers."""
        *sums, count = sum_over_ranks([*self._sums.values(), float(self._label_tokens)], device)
        total, *terms = (value / max(count, 1.0) for value in sums)
        names = list(self._sums)[1:]
        return {"loss": total, "terms": dict(zip(names, terms, strict=True)), "label_tokens": int(count)}


class Log:
    """Turns steps into lines: the mean over the steps since the last line, weighted by their valid tokens.

    Args:
        progress: gets the lines; a resumed run's holds those up to its step.
        every: steps of one line.
        last: the last step, which is always logged.
        on_log: called after each new line.
    """

    def __init__(self, progress: Progress, *, every: int, last: int, on_log: OnLog | None):
        self._progress, self._every, self._last, self._on_log = progress, every, last, on_log
        self._window: list[dict[str, Any]] = []

    @property
    def note(self) -> str:
        """The latest line in a few words."""
        trained = [line for line in self._progress.log if "loss" in line]
        return f"loss {trained[-1]['loss']:.3f}, {trained[-1]['tokens_per_s']:.0f} tokens/s" if trained else ""

    def add_step(self, figures: dict[str, Any], *, tokens: int, seconds: float) -> None:
        """Count a step, and write a line where one is due.

        Args:
            figures: `loss`, `terms`, `label_tokens`, `learning_rate`, `grad_norm` of the step.
            tokens: packed tokens of the step.
            seconds: its wall time.
        """
        progress = self._progress
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        self._window.append({**figures, "tokens": tokens, "seconds": seconds})
        if progress.step % self._every == 0 or progress.step == self._last:
            self._write(self._line())

    def add_evaluation(self, result: dict[str, Any]) -> None:
        """Write a line with an evaluation's result."""
        line = {"step": self._progress.step, "tokens": self._progress.tokens}
        self._write({**line, "eval_loss": result["loss"], "eval_terms": result["terms"]})

    def _line(self) -> dict[str, Any]:
        window, self._window = self._window, []
        count = max(1, sum(step["label_tokens"] for step in window))

        def mean(values: list[float]) -> float:
            return sum(value * step["label_tokens"] for value, step in zip(values, window, strict=True)) / count

        return {
            "step": self._progress.step,
            "tokens": self._progress.tokens,
            "loss": mean([step["loss"] for step in window]),
            "terms": {name: mean([step["terms"][name] for step in window]) for name in window[0]["terms"]},
            "learning_rate": window[-1]["learning_rate"],
            "grad_norm": window[-1]["grad_norm"],
            "tokens_per_s": sum(step["tokens"] for step in window) / sum(step["seconds"] for step in window),
        }

    def _write(self, line: dict[str, Any]) -> None:
        self._progress.log.append(line)
        if self._on_log:
            self._on_log(self._progress.log)
