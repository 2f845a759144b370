"""One worker's optimizer step: forward and backward over its micro-batches, clip, update; how workers share it is a strategy's business."""

import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ray_jobs.core.errors import DataError, TrainingFailed
from ray_jobs.training.batches import Batch, PackedRows, eval_batches, step_batches, step_rows
from ray_jobs.training.checkpoint import Checkpoint, Progress, TensorFiles, put_tensors, save_checkpoint
from ray_jobs.training.loss_hooks import LossHooks
from ray_jobs.training.losses import Loss
from ray_jobs.training.metrics import Tally
from ray_jobs.training.optimizers import build_optimizer
from ray_jobs.training.ranks import gather, rank, sum_over_ranks, world_size
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.strategies.base import LossModule, Strategy, autocast
from ray_jobs.training.timing import Clock


class Worker:
    """A model with its optimizer, on one worker of `world_size`.

    Args:
        model: equal on all workers, on its device.
        strategy: how workers share a step; serves one run.
        dtype: of matrix products.
        resume_from: folder of a checkpoint, of any strategy and number of workers.
    """

    def __init__(self, model: nn.Module, loss: Loss, recipe: Recipe, strategy: Strategy, dtype: torch.dtype, resume_from: Path | None):
        self._model, self._recipe, self._strategy, self._dtype = model, recipe, strategy, dtype
        self._device = next(model.parameters()).device
        self.clock, self.hooks = Clock(self._device), LossHooks(loss)
        self.progress = Progress()
        checkpoint = None if resume_from is None else Checkpoint(resume_from)
        if checkpoint is not None:
            checkpoint.put_weights(model)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        strategy.prepare(LossModule(model, loss, dtype), self._build_optimizer, dtype=dtype, max_grad_norm=recipe.max_grad_norm)
        if checkpoint is not None:
            self.progress = checkpoint.progress
            if self.progress.loss_state:
                self.hooks.load_state(self.progress.loss_state)
            strategy.load_optimizer_state(checkpoint.optimizer_state())
            strategy.load_scaler_state(checkpoint.scaler)

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint; every worker must call it, and one gives a folder."""
        self.hooks.flush()
        self.progress.loss_state = self.hooks.state()
        save_checkpoint(folder, self._strategy, self.progress)

    def batches(self, rows: PackedRows, num_steps: int) -> Iterator[list[Batch]]:
        """Yield this worker's micro-batches of each step up to `num_steps`, from where the run stands; the loss knows them ahead."""
        recipe, self._num_rows = self._recipe, len(rows)
        sizes = {"global_batch_size": recipe.global_batch_size, "micro_batch_size": recipe.micro_batch_size}
        place = {"seed": recipe.seed, "rank": rank(), "world_size": world_size()}
        first = self.progress.step
        steps = (step_batches(rows, step=step, **sizes, **place) for step in range(first, num_steps))
        return self.hooks.announced(steps, first_step=first)

    def step(self, upcoming: Iterator[list[Batch]], step: int, *, learning_rate: float) -> dict[str, Any]:
        """Do one optimizer step, and return its figures over all workers.

        Args:
            upcoming: what `batches` returned; the step's are next.

        Raises:
            TrainingFailed: the loss is no longer finite.
            DataError: no token of the global batch has a label.
        """
        recipe = self._recipe
        self._seed(step)
        with self.clock("data"):
            batches = next(upcoming)
        with autocast(self._device, self._dtype):
            batches = self.hooks.draw(self._model, batches, step=step, seed=recipe.seed)
        tally = self._backward(batches)
        figures = tally.over_ranks(self._device)
        if not math.isfinite(figures["loss"]):
            where = self._rows_of(step, tally.not_finite)
            raise TrainingFailed(
                f"the loss is {figures['loss']} at step {step + 1}, from packed rows {where}: lower learning_rate "
                f"({recipe.learning_rate}) or use dtype float32"
            )
        if not figures["label_tokens"]:
            raise DataError(
                f"no token of step {step + 1} has a label: its packed rows {self._rows_of(step, range(len(batches)))} teach nothing; "
                "raise global_batch_size, or run `raystill prepare` again with other rows"
            )
        with self.clock("optimizer"):
            norm = self._strategy.update(learning_rate)
        self.hooks.after_step(figures["terms"])
        return {**figures, "learning_rate": learning_rate, "grad_norm": norm}

    def evaluate(self, rows: PackedRows) -> dict[str, Any]:
        """Return the loss in nats per valid token over all rows: `loss`, `terms`, `label_tokens`."""
        figures = evaluate_with(self._strategy.forward, self._model, rows, micro_batch_size=self._recipe.micro_batch_size, hooks=self.hooks)
        self._strategy.after_evaluation()
        return figures

    def finish(self) -> None:
        """Leave the model on worker 0 with its trained parameters whole; elsewhere they may stay in pieces."""
        self.hooks.flush()
        if self._strategy.in_pieces:
            self._make_whole()
        self._strategy.release()

    def _make_whole(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            files = TensorFiles(Path(folder) if rank() == 0 else None, "trained")
            for name, tensor in self._strategy.weights():
                files.add(name, tensor)
            files.flush()
            if rank() == 0:
                put_tensors(self._model, files)

    def _backward(self, batches: list[Batch]) -> Tally:
        self._model.train()
        tally = Tally()
        num_valid = sum_over_ranks([float(sum(batch.num_valid for batch in batches))], self._device)[0]
        # strategies take the mean over workers, where the loss wants the sum
        scale = world_size() / max(num_valid, 1.0)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self.clock("forward"):
                sums = self._strategy.forward(batch.to(self._device), last=last)
            with self.clock("backward"):
                self._strategy.backward(sums.total * scale, last=last)
            tally.add(sums, batch)
        return tally

    def _rows_of(self, step: int, places: Iterable[int]) -> list[int]:
        """Return the indices of the packed rows in some micro-batches of all workers; every worker must call it."""
        recipe, size = self._recipe, self._recipe.micro_batch_size
        chosen = step_rows(self._num_rows, step=step, seed=recipe.seed, global_batch_size=recipe.global_batch_size)
        mine = chosen[rank() :: world_size()]
        return sorted(
            {row for found in gather([mine[place * size : (place + 1) * size] for place in places]) for rows in found for row in rows}
        )

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        recipe = self._recipe
        return build_optimizer(
            model,
            name=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            plus_ratio=recipe.plus_ratio,
        )

    def _seed(self, step: int) -> None:
        # dropout of a step is a function of (seed, step, rank), so a resumed run draws what it would have drawn
        state = np.random.SeedSequence([self._recipe.seed, step, rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]) % 2**63)


@torch.no_grad()
def evaluate_with(forward: Any, model: nn.Module, rows: PackedRows, *, micro_batch_size: int, hooks: LossHooks) -> dict[str, Any]:
    """Return the loss in nats per valid token over all rows; every worker must call it.

    Args:
        forward: from a micro-batch on the model's device to its LossSums.
        model: goes into eval mode, and back.
        hooks: of the loss.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    tally = Tally()
    singly = ([batch] for batch in eval_batches(rows, micro_batch_size=micro_batch_size, rank=rank(), world_size=world_size()))
    for (batch,) in hooks.announced(singly):
        tally.add(forward(batch.to(device)), batch)
    model.train(was_training)
    return tally.over_ranks(device)
