"""Losses per token over micro-batches and workers, and the lines of metrics.jsonl."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from ray_jobs.core.memory import peaks
from ray_jobs.training.batches import Batch
from ray_jobs.training.checkpoint import Progress
from ray_jobs.training.losses import LossSums
from ray_jobs.training.ranks import gather, sum_over_ranks, world_size
from ray_jobs.training.timing import Clock, CommunicationProbe, shares

OnLog = Callable[[list[dict[str, Any]]], None]
"""Called with all lines logged so far."""


class Tally:
    """Sums of losses and of valid tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._label_tokens = self._added = 0
        self.not_finite: list[int] = []
        """Places, from 0, of the micro-batches whose loss was not a finite number."""

    def add(self, sums: LossSums, batch: Batch) -> None:
        """Add a micro-batch."""
        values = {name: float(value) for name, value in {"": sums.total.detach(), **sums.terms}.items()}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        for name, count in sums.tokens.items():
            self._tokens[name] = self._tokens.get(name, 0) + count
        if not math.isfinite(values[""]):
            self.not_finite.append(self._added)
        self._added += 1
        self._label_tokens += batch.num_valid

    def over_ranks(self, device: torch.device) -> dict[str, Any]:
        """Return `loss` and `terms` in nats per valid token, and `label_tokens`, over all workers.

        Terms of some tokens alone are per one of those, which `term_tokens` counts; without any such a term is left out.
        """
        own = [float(count) for count in self._tokens.values()]
        found = sum_over_ranks([*self._sums.values(), *own, float(self._label_tokens)], device)
        total, *terms, count = (*found[: len(self._sums)], found[-1])
        tokens = {name: int(num) for name, num in zip(self._tokens, found[len(self._sums) : -1], strict=True)}
        behind = {name: tokens.get(name, max(count, 1.0)) for name in list(self._sums)[1:]}
        means = {name: value / behind[name] for name, value in zip(behind, terms, strict=True) if behind[name]}
        return {
            "loss": total / max(count, 1.0),
            "terms": means,
            "label_tokens": int(count),
            **({"term_tokens": tokens} if tokens else {}),
        }


class Log:
    """Turns steps into lines: the mean over the steps since the last line, weighted by their valid tokens, a term's by its own.

    Every worker has one and calls it alike: a line holds the memory peaks of all of them, and their mean shares of time.

    Args:
        progress: gets the lines; a resumed run's holds those up to its step.
        every: steps of one line.
        last: the last step, which is always logged.
        clock: what timed the parts of the steps.
        probe: what sampled their communication.
        counts: what the loss did on this worker since it began (see `LossHooks`).
        on_log: called after each new line.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        every: int,
        last: int,
        clock: Clock,
        probe: CommunicationProbe,
        on_log: OnLog | None,
        counts: Callable[[], dict[str, float]] = dict,
    ):
        self._progress, self._every, self._last, self._on_log = progress, every, last, on_log
        self._clock, self._probe, self._counts = clock, probe, counts
        self._counted: dict[str, float] = {}
        self._last_step = progress.step
        self._window: list[dict[str, Any]] = []
        self._first_step, self._began = progress.step, 0.0

    @property
    def note(self) -> str:
        """The latest line in a few words."""
        trained = [line for line in self._progress.log if "loss" in line]
        return in_words(trained[-1]) if trained else ""

    def add_step(self, figures: dict[str, Any], *, tokens: int, seconds: float) -> None:
        """Count a step, and write a line where one is due; then every worker must have called it.

        Args:
            figures: `loss`, `terms`, `label_tokens`, `learning_rate`, `grad_norm` of the step, and `term_tokens` where it has some.
            tokens: packed tokens of the step.
            seconds: its wall time.
        """
        progress = self._progress
        self._began = self._began or time.monotonic() - seconds
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        self._window.append({**figures, "tokens": tokens, "seconds": seconds})
        if progress.step % self._every == 0 or progress.step == self._last:
            self._write({**self._line(), **self._readings()})

    def add_evaluation(self, result: dict[str, Any]) -> None:
        """Write a line with an evaluation's result."""
        line = {"step": self._progress.step, "tokens": self._progress.tokens}
        self._write({**line, "eval_loss": result["loss"], "eval_terms": result["terms"], "wall_time": time.time()})

    def _line(self) -> dict[str, Any]:
        window, self._window = self._window, []
        tokens_per_s = sum(step["tokens"] for step in window) / sum(step["seconds"] for step in window)
        return {
            "step": self._progress.step,
            "tokens": self._progress.tokens,
            "loss": _mean([(step["loss"], step["label_tokens"]) for step in window]),
            "terms": _mean_terms(window),
            "learning_rate": window[-1]["learning_rate"],
            "grad_norm": norm if math.isfinite(norm := window[-1]["grad_norm"]) else None,  # JSON has no infinity
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_worker": tokens_per_s / world_size(),
        }

    def _readings(self) -> dict[str, Any]:
        mine = {**shares(self._clock.take()), "communication": self._probe.share}
        found = gather((mine, peaks()))
        told = self._told()
        done, left = self._progress.step - self._first_step, self._last - self._progress.step
        return {
            "shares": {part: round(sum(theirs[part] for theirs, _ in found) / len(found), 4) for part in mine},
            **{name: [peak[name] for _, peak in found] for name in found[0][1]},
            **({"counts": told} if told else {}),
            "eta_s": round((time.monotonic() - self._began) / done * left, 1),
            "wall_time": time.time(),
        }

    def _told(self) -> dict[str, float]:
        """Return what the loss did since the last line: numbers of all workers together, seconds of a step's mean worker."""
        now = self._counts()
        mine = {name: value - self._counted.get(name, 0) for name, value in now.items()}
        self._counted = now
        every, steps = gather(mine), max(1, self._progress.step - self._last_step)
        self._last_step = self._progress.step
        sums = {name: sum(each[name] for each in every) for name in mine}
        return {name: round(value / steps / len(every), 6) if name.endswith("_s") else value for name, value in sums.items()}

    def _write(self, line: dict[str, Any]) -> None:
        self._progress.log.append(line)
        if self._on_log:
            self._on_log(self._progress.log)


def _mean_terms(window: list[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for step in window for name in step["terms"])
    return {name: _mean([(step["terms"][name], _tokens_of(step, name)) for step in window if name in step["terms"]]) for name in names}


def _tokens_of(step: dict[str, Any], term: str) -> int:
    return step.get("term_tokens", {}).get(term, step["label_tokens"])


def _mean(weighted: list[tuple[float, int]]) -> float:
    return sum(value * tokens for value, tokens in weighted) / max(1, sum(tokens for _, tokens in weighted))


def counted(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return what the loss did over a run, from its lines: numbers of all workers, and seconds of the mean worker, by name."""
    totals: dict[str, float] = {}
    before = 0
    for line in (line for line in lines if "loss" in line):
        for name, value in line.get("counts", {}).items():
            totals[name] = totals.get(name, 0) + value * (line["step"] - before if name.endswith("_s") else 1)
        before = line["step"]
    return totals


def in_words(line: dict[str, Any]) -> str:
    """Return a training line of metrics.jsonl for people, the figures they look for first in front."""
    parts = " ".join(f"{part} {share:.0%}" for part, share in line["shares"].items())
    peak = f"{max(line['host_peak_bytes']) / 2**30:.2f} GiB"
    if any(line["gpu_peak_bytes"]):
        peak += f" host, {max(line['gpu_peak_bytes']) / 2**30:.2f} GiB GPU"
    return (
        f"loss {line['loss']:.3f}, lr {line['learning_rate']:.2e}, {line['tokens_per_s_per_worker']:.0f} tokens/s a worker, "
        f"peak {peak}, {parts}"
    )
