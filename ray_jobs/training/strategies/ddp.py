"""Whole copies: each worker holds all of the model; gradients are averaged in the backward pass. One process alone is the simplest case."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums
from ray_jobs.training.postponed import fill
from ray_jobs.training.ranks import world_size
from ray_jobs.training.strategies.base import BuildOptimizer, LossModule, TorchStrategy


class Ddp(TorchStrategy):
    """DistributedDataParallel, or nothing around the model where there is one worker."""

    def prepare(self, module: LossModule, build_optimizer: BuildOptimizer, *, dtype: torch.dtype, max_grad_norm: float) -> None:
        """Take a model that is equal on all workers."""
        self._module = module
        fill(module)
        self._make_optimizer(build_optimizer, next(module.parameters()).device, dtype, max_grad_norm)
        self._forward: Any = module
        if world_size() > 1:
            self._forward = DistributedDataParallel(module, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def forward(self, batch: Batch, *, last: bool = True) -> LossSums:
        """Return the loss of a micro-batch."""
        with self._synchronised(last):
            return self._forward(batch) if torch.is_grad_enabled() else self._module(batch)

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of a scalar; workers exchange gradients at the last."""
        with self._synchronised(last):
            self._scaler.scale(total).backward()

    def after_evaluation(self) -> None:
        """Nothing: the parameters are whole all the time."""

    def release(self) -> None:
        """Nothing: the model itself has no hooks."""

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return self._forward.no_sync() if world_size() > 1 and not last else contextlib.nullcontext()
