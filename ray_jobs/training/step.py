"""One worker's optimizer step: forward and backward over its micro-batches, clip, update."""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.training.batches import Batch, PackedRows, step_batches
from ray_jobs.training.checkpoint import Progress, load_checkpoint, save_checkpoint, trainable
from ray_jobs.training.losses import Loss, LossSums
from ray_jobs.training.metrics import Tally
from ray_jobs.training.optimizers import build_optimizer, set_learning_rate
from ray_jobs.training.ranks import rank, sum_over_ranks, world_size
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.timing import Clock


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which matrix products are computed in `dtype`; parameters keep their own."""
    return torch.autocast(device.type, dtype) if dtype is not torch.float32 else contextlib.nullcontext()


class Worker:
    """A model with its optimizer, on one worker of `world_size`."""

    def __init__(self, model: nn.Module, loss: Loss, recipe: Recipe, dtype: torch.dtype):
        self._model, self._recipe, self._dtype = model, recipe, dtype
        self._device = next(model.parameters()).device
        self.clock = Clock(self._device)
        self._parameters = list(trainable(model).values())
        self._optimizer = build_optimizer(
            model,
            name=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            plus_ratio=recipe.plus_ratio,
        )
        self._scaler = GradScaler(self._device.type, enabled=dtype is torch.float16)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self._forward: Any = _Forward(model, loss)
        if world_size() > 1:
            self._forward = DistributedDataParallel(self._forward, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def load(self, folder: Path) -> Progress:
        """Go on from a checkpoint."""
        return load_checkpoint(folder, self._model, self._optimizer, self._scaler)

    def save(self, folder: Path, progress: Progress) -> None:
        """Write a checkpoint."""
        save_checkpoint(folder, self._model, self._optimizer, self._scaler, progress)

    def step(self, rows: PackedRows, step: int, *, learning_rate: float) -> dict[str, Any]:
        """Do one optimizer step, and return its figures over all workers.

        Raises:
            TrainingFailed: the loss is no longer finite.
        """
        recipe = self._recipe
        self._seed(step)
        with self.clock("data"):
            batches = step_batches(
                rows,
                step=step,
                seed=recipe.seed,
                global_batch_size=recipe.global_batch_size,
                micro_batch_size=recipe.micro_batch_size,
                rank=rank(),
                world_size=world_size(),
            )
        figures = self._backward(batches).over_ranks(self._device)
        if not math.isfinite(figures["loss"]):
            raise TrainingFailed(
                f"the loss is {figures['loss']} at step {step + 1}: lower learning_rate ({recipe.learning_rate}) or use dtype float32"
            )
        with self.clock("optimizer"):
            norm = self._update(learning_rate)
        return {**figures, "learning_rate": learning_rate, "grad_norm": norm}

    def _backward(self, batches: list[Batch]) -> Tally:
        self._model.train()
        tally = Tally()
        num_valid = sum_over_ranks([float(sum(batch.num_valid for batch in batches))], self._device)[0]
        # DistributedDataParallel takes the mean over workers, where the loss wants the sum
        scale = world_size() / max(num_valid, 1.0)
        for index, batch in enumerate(batches):
            with self._synchronised(index == len(batches) - 1):
                with self.clock("forward"), autocast(self._device, self._dtype):
                    sums = self._forward(batch.to(self._device))
                with self.clock("backward"):
                    self._scaler.scale(sums.total * scale).backward()
            tally.add(sums, batch)
        return tally

    def _update(self, learning_rate: float) -> float:
        set_learning_rate(self._optimizer, learning_rate)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return self._forward.no_sync() if world_size() > 1 and not last else contextlib.nullcontext()

    def _seed(self, step: int) -> None:
        # dropout of a step is a function of (seed, step, rank), so a resumed run draws what it would have drawn
        state = np.random.SeedSequence([self._recipe.seed, step, rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]) % 2**63)


class _Forward(nn.Module):
    """The loss as a module's forward, so that DistributedDataParallel sees the whole of it."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self._loss = (loss,)  # in a tuple: a loss that is a module (with a teacher in it) is not part of what is trained

    def forward(self, batch: Batch) -> LossSums:
        return self._loss[0](self.model, batch)
