"""Bytes that a forward pass keeps for the backward pass, counted on tensors that have shapes but no memory.

The model's own code runs once with one decoder layer and once with two; autograd reports every tensor it saves. So
the count follows the architecture, the adapters and the number format without a formula for each.
Shapes: B rows, T positions.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from ray_jobs.training.losses import causal_lm

BuildModel = Callable[[int], nn.Module]
"""Returns the model to be trained with so many decoder layers, on the meta device."""


def activation_bytes(build: BuildModel, *, num_layers: int, batch_size: int, length: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Return the bytes of saved tensors of one micro-batch, up to the final norm.

    Args:
        build: model with the given number of layers, parameters requiring gradients as in training.
        num_layers: layers of the whole model.
        batch_size: rows of a micro-batch.
        length: tokens of a row.
        dtype: type of matrix products (autocast where parameters are wider).
        checkpointing: each layer keeps its input alone; one layer at a time is recomputed whole.
    """
    one, two = (_saved_bytes(build(layers).train(), batch_size, length, dtype) for layers in (1, 2))
    if not checkpointing:
        return one + (num_layers - 1) * (two - one)
    config = causal_lm(build(1)).config
    layer_input = batch_size * length * config.hidden_size * max(dtype.itemsize, config.dtype.itemsize)
    return one + (num_layers - 1) * layer_input


def _saved_bytes(model: nn.Module, batch_size: int, length: int, dtype: torch.dtype) -> int:
    body = causal_lm(model).get_decoder()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {name: _like(p) for name, p in [*body.named_parameters(), *body.named_buffers()]}
        ids_BT = torch.zeros(batch_size, length, dtype=torch.long)
        # Packed rows get a mask of blocks; its values do not matter here, its size does.
        mask_B1TT = torch.zeros(batch_size, 1, length, length, dtype=torch.bool)
        inputs = {"input_ids": ids_BT, "position_ids": ids_BT, "attention_mask": mask_B1TT, "use_cache": False}
        saved = _Saved(own=tensors)
        precision = torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(saved.add, saved.get), precision:
            functional_call(body, tensors, kwargs=inputs)
        return saved.total


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)


class _Saved:
    """Sums the storages that autograd saves, each once, the model's own left out."""

    def __init__(self, own: dict[str, Tensor]):
        self._seen: dict[Any, Tensor] = {}
        self._own = {tensor.untyped_storage()._cdata for tensor in own.values()}
        self.total = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # held, so that no later storage takes its place
            self.total += storage.nbytes()
        return tensor

    @staticmethod
    def get(tensor: Tensor) -> Tensor:
        return tensor
