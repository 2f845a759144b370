"""The one training loop: given a model, a loss and packed rows. Plain Python; more workers where torch.distributed runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_jobs.core.progress import OnProgress
from ray_jobs.training.batches import PackedRows, step_rows
from ray_jobs.training.checkpoint import Progress
from ray_jobs.training.loss_hooks import LossHooks
from ray_jobs.training.losses import Loss
from ray_jobs.training.metrics import Log, OnLog
from ray_jobs.training.models import choose_dtype
from ray_jobs.training.ranks import rank, world_size
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.step import Worker, evaluate_with
from ray_jobs.training.strategies import Strategy, choose_strategy
from ray_jobs.training.strategies.base import LossModule
from ray_jobs.training.timing import STEP, CommunicationProbe

Save = Callable[[Path | None], None]
"""Writes a checkpoint into an existing folder; every rank must call it, and one gives a folder."""
OnCheckpoint = Callable[[int, Save], None]
"""Called on every rank with the step and the function that writes the checkpoint."""


def train(  # noqa: PLR0913 - the whole of a run in one place
    model: nn.Module,
    loss: Loss,
    rows: PackedRows,
    *,
    eval_rows: PackedRows | None,
    recipe: Recipe,
    strategy: Strategy | None = None,
    resume_from: Path | None = None,
    on_progress: OnProgress | None = None,
    on_log: OnLog | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> Progress:
    """Train the model in place, and return where it ended: rank 0 has the trained parameters whole, whatever the strategy.

    The gradient of a step is that of the loss's mean over the valid tokens of the global batch: the same for any
    number of workers and of micro-batches. Trainable parameters stay in their own type (float32); products are
    computed in the recipe's.

    Args:
        model: trainable parameters require gradients; on its device already.
        eval_rows: held-out rows; none skips evaluation.
        strategy: how workers share a step; none is whole copies.
        resume_from: folder of a checkpoint that this function wrote, under any strategy and number of workers.

    Raises:
        TrainingFailed: the loss is no longer finite.
    """
    steps = recipe.num_steps(len(rows))
    dtype = choose_dtype(recipe.dtype, next(model.parameters()).device.type)
    first = step_rows(len(rows), step=0, seed=recipe.seed, global_batch_size=recipe.global_batch_size)[:2]
    LossHooks(loss).check(model, [rows[index] for index in first], dtype)
    worker = Worker(model, loss, recipe, strategy or choose_strategy(), dtype, resume_from)
    progress = worker.progress
    probe = CommunicationProbe(world_size=world_size(), first_step=progress.step)
    log = Log(
        progress,
        every=recipe.log_every_steps,
        last=steps,
        clock=worker.clock,
        probe=probe,
        counts=worker.hooks.counts,
        on_log=on_log if rank() == 0 else None,
    )
    if eval_rows is not None and progress.eval_before is None:
        progress.eval_before = worker.evaluate(eval_rows)
        log.add_evaluation(progress.eval_before)
    upcoming = worker.batches(rows, steps)
    for step in range(progress.step, steps):
        started = time.perf_counter()
        with worker.clock(STEP), probe(step):
            figures = worker.step(upcoming, step, learning_rate=recipe.learning_rate_at(step, steps))
        chosen = step_rows(len(rows), step=step, seed=recipe.seed, global_batch_size=recipe.global_batch_size)
        log.add_step(figures, tokens=rows.num_tokens(chosen), seconds=time.perf_counter() - started)
        if eval_rows is not None and (step + 1 == steps or _due(step + 1, recipe.eval_every_steps)):
            progress.eval_after = worker.evaluate(eval_rows)
            log.add_evaluation(progress.eval_after)
        if on_checkpoint and (step + 1 == steps or _due(step + 1, recipe.checkpoint_every_steps)):
            on_checkpoint(step + 1, worker.save)
        if on_progress and rank() == 0:
            on_progress(step + 1, steps, log.note)
    worker.finish()
    return progress


def evaluate(
    model: nn.Module, loss: Loss, rows: PackedRows, *, micro_batch_size: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return a whole model's loss in nats per valid token over all rows: `loss`, `terms`, `label_tokens`; every worker must call it."""
    return evaluate_with(LossModule(model, loss, dtype), model, rows, micro_batch_size=micro_batch_size, hooks=LossHooks(loss))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
