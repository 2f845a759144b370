"""FSDP2 shards: each worker holds a part of every parameter, gradient and moment, and gathers one decoder layer at a time."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums, decoder_layers
from ray_jobs.training.postponed import cut_in_parts
from ray_jobs.training.ranks import ensure_group, world_size
from ray_jobs.training.strategies.base import BuildOptimizer, LossModule, TorchStrategy


class Fsdp(TorchStrategy):
    """`fully_shard` on each decoder layer and on the loss around the model.

    The root group (embeddings, final norm, head) stays gathered from the loss's forward to its backward pass, because
    losses read the head's weight outside the head's own forward. Gradients are reduced after every micro-batch, so
    that they stay in pieces too.
    """

    _module: Any

    def prepare(self, module: LossModule, build_optimizer: BuildOptimizer, *, dtype: torch.dtype, max_grad_norm: float) -> None:
        """Cut a model that is equal on all workers into shards."""
        device = next(module.parameters()).device
        ensure_group(device)
        mesh = init_device_mesh(device.type, (world_size(),))
        module.caches_casts = False  # copies would outlive the gathered parameters
        cut_in_parts(decoder_layers(module.model), lambda layer: fully_shard(layer, mesh=mesh, mp_policy=_policy(layer, dtype)))
        cut_in_parts([module], functools.partial(fully_shard, mesh=mesh, reshard_after_forward=False))
        self._module = module
        self._make_optimizer(build_optimizer, device, dtype, max_grad_norm)

    def forward(self, batch: Batch, *, last: bool = True) -> LossSums:
        """Return the loss of a micro-batch."""
        return self._module(batch)

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of a scalar to this worker's shards."""
        self._scaler.scale(total).backward()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained parameters by name, gathered one at a time."""
        self.after_evaluation()
        return super().weights()

    def release(self) -> None:
        """Give the modules their own classes back: FSDP2's would look for its shards in every parameter."""
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.__class__ = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))

    def after_evaluation(self) -> None:
        """Free the root group, which no backward pass has freed."""
        self._module.reshard()

    @property
    def in_pieces(self) -> bool:
        """Each worker holds a part of every parameter."""
        return True

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _piece(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _policy(layer: nn.Module, dtype: torch.dtype) -> MixedPrecisionPolicy:
    # weights that are trained in float32 are gathered in the computation type, because autocast would keep a copy of
    # each layer until its backward pass; what is frozen is in the computation type, or quantized, already
    if not all(parameter.requires_grad for parameter in layer.parameters()):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
