"""What a training run takes beside memory: steps, tokens, time, and disk for its checkpoints."""

from typing import Any, NamedTuple

from ray_jobs.training.memory_plan import Request, optimizer_bytes, trained_sizes
from ray_jobs.training.recipe import Recipe

_FLOAT32 = 4


class Rate(NamedTuple):
    """Tokens a second of one worker, and who says so."""

    tokens_per_s: float
    source: str


class Estimate(NamedTuple):
    """What a run takes; None is unknown."""

    steps: int | None
    tokens: int | None
    seconds: float | None
    rate: Rate | None
    checkpoint_bytes: int
    """One checkpoint: trained numbers and the optimizer's state."""
    disk_bytes: int
    """The checkpoints kept, one more while it is written, and the exported result."""

    @property
    def facts(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return {**self._asdict(), "rate": self.rate and self.rate._asdict()}

    @property
    def lines(self) -> list[str]:
        """The estimate for people."""
        steps = f"{self.steps} steps" if self.steps else "steps unknown until prepare has counted the rows (or set max_steps)"
        tokens = f", {self.tokens / 1e6:.2f} M tokens" if self.tokens else ""
        rate = f"{self.rate.tokens_per_s:.0f} tokens/s a worker ({self.rate.source})" if self.rate else "rate unknown: give tokens_per_s"
        time = f", about {_duration(self.seconds)} at {rate}" if self.seconds else f", {rate}"
        disk = f"disk: {self.checkpoint_bytes / 1e9:.2f} GB a checkpoint, {self.disk_bytes / 1e9:.2f} GB at most with the result"
        return [f"{steps}{tokens}{time}", disk]


def measured_rate(manifest: dict[str, Any] | None, workers: int) -> Rate | None:
    """Return the rate of a finished stage by its manifest; None where there is none or it took no time."""
    if not manifest or not manifest.get("train_seconds"):
        return None
    return Rate(manifest["counts"]["tokens"] / manifest["train_seconds"] / workers, "measured in this run")


def estimate(
    request: Request, recipe: Recipe, *, num_rows: int | None, rate: Rate | None, keep_checkpoints: int, export_dtype_bytes: int
) -> Estimate:
    """Return what a run takes.

    Args:
        num_rows: packed rows of training, where they have been counted.
        rate: tokens a second of one worker.
        keep_checkpoints: checkpoints kept while training.
        export_dtype_bytes: bytes a number of the exported result.
    """
    sizes = trained_sizes(request)
    checkpoint = sum(sizes) * _FLOAT32 + optimizer_bytes(sizes, request.optimizer)
    steps = recipe.num_steps(num_rows) if num_rows is not None else recipe.max_steps
    # rows are cut to the length but for a few at the end, so that this is an upper bound
    tokens = steps * recipe.global_batch_size * request.work.length if steps else None
    seconds = tokens / (rate.tokens_per_s * request.sharding.workers) if tokens and rate else None
    disk = checkpoint * (keep_checkpoints + 1) + sum(sizes) * export_dtype_bytes
    return Estimate(steps, tokens, seconds, rate, checkpoint, disk)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
