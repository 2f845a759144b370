"""The memory of one micro-batch's forward and backward pass, found by running both on tensors that have shapes but no memory.

The model's own code and the real loss run with one decoder layer and with two; every tensor is counted from its
first operation to its last. So the count follows the architecture, the adapters, the number format and what autograd
keeps, without a formula for each. Layers are alike, so each phase's peak is a straight line in their number.
Shapes: B rows, T positions, N predicted positions, H width.
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.pytorch_utils import Conv1D

from ray_jobs.training.losses import CHUNK_POSITIONS, causal_lm, head_cross_entropy

BuildModel = Callable[[int], nn.Module]
"""Returns the model to be trained with so many decoder layers, on the meta device."""


class Phases(NamedTuple):
    """Most bytes alive beside parameters, gradients and optimizer, in each phase of a micro-batch."""

    forward: int
    """The decoder layers."""
    saved: int
    """What is alive when the last layer has run: kept for the backward pass."""
    loss: int
    """The output head with its chunks of scores, forward and backward."""
    backward: int
    """The backward pass of the layers and the embedding."""

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self)

    @property
    def scores(self) -> int:
        """What the loss adds to the saved tensors."""
        return self.loss - self.saved


def simulate(build: BuildModel, *, num_layers: int, batch_size: int, length: int, dtype: torch.dtype, checkpointing: bool) -> Phases:
    """Return the memory of one micro-batch.

    Args:
        build: model with the given number of layers, parameters requiring gradients as in training.
        num_layers: layers of the whole model.
        batch_size: rows of a micro-batch.
        length: tokens of a row.
        dtype: type of matrix products (autocast where parameters are wider).
        checkpointing: each layer keeps its input alone; one layer at a time is recomputed whole.
    """
    first = _run(build(1), batch_size, length, dtype, checkpointing)
    if num_layers == 1:
        return first
    second = _run(build(2), batch_size, length, dtype, checkpointing)
    return Phases(*(one + (num_layers - 1) * (two - one) for one, two in zip(first, second, strict=True)))


def forward_bytes(model: nn.Module, *, batch_size: int, length: int, dtype: torch.dtype) -> int:
    """Return the most bytes alive in a forward pass that keeps nothing, as a frozen teacher's; the output head is no part of it.

    Args:
        model: two decoder layers suffice, on the meta device: one layer's input is let go while the next one works.
        dtype: type of matrix products.
    """
    with FakeTensorMode(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        head_VH = _give_shapes_to(model.eval())
        ids_BT = torch.zeros(batch_size, length, dtype=torch.long)
        mask_B1TT = torch.zeros(batch_size, 1, length, length, dtype=torch.bool)
        with Alive(own=[head_VH, *model.parameters(), *model.buffers()]) as alive:
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                causal_lm(model).get_decoder()(input_ids=ids_BT, position_ids=ids_BT, attention_mask=mask_B1TT, use_cache=False)
    return alive.peaks["forward"]


def _run(model: nn.Module, batch_size: int, length: int, dtype: torch.dtype, checkpointing: bool) -> Phases:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head_VH = _give_shapes_to(model.train())
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        ids_BT = torch.zeros(batch_size, length, dtype=torch.long)
        num_scored = min(2 * CHUNK_POSITIONS, batch_size * (length - 1))  # further chunks take the place of these
        labels_N = torch.zeros(num_scored, dtype=torch.long)
        # Packed rows get a mask of blocks; its values do not matter here, its size does.
        mask_B1TT = torch.zeros(batch_size, 1, length, length, dtype=torch.bool)
        with Alive(own=[head_VH, *model.parameters(), *model.buffers()]) as alive:
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                body = causal_lm(model).get_decoder()
                inputs = {"input_ids": ids_BT, "position_ids": ids_BT, "attention_mask": mask_B1TT, "use_cache": False}
                hidden_BTH = body(**inputs).last_hidden_state
                hidden_BTH.register_hook(alive.begin_backward)
                hidden_NH = hidden_BTH[:, :-1].flatten(0, 1).clone()  # the loss picks the valid positions, which copies
                saved = alive.begin("loss")
                gradient_NH = torch.empty_like(hidden_NH)  # that of all positions
                loss = head_cross_entropy(hidden_NH[:num_scored], head_VH, None, labels_N)
            del hidden_BTH, hidden_NH, gradient_NH
            loss.backward()
    return Phases(saved=saved, **alive.peaks)


def _give_shapes_to(model: nn.Module) -> Tensor:
    """Put fake tensors in place of the meta device's, and return the output head's weight.

    A gradient is let go of once it is whole: the plan counts gradients apart. That of a tied head is not, because
    autograd holds it until the embedding's is there.
    """
    head = causal_lm(model).get_output_embeddings()
    made: dict[int, Tensor] = {}
    tied = any(head.weight is p for name, p in causal_lm(model).get_decoder().named_parameters())
    head_VH = nn.Parameter(torch.empty(head.weight.shape, dtype=head.weight.dtype), requires_grad=head.weight.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, made.setdefault(id(parameter), new))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    for parameter in [*made.values(), *([] if tied else [head_VH])]:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)
    return head_VH


def forget(parameter: Tensor) -> None:
    """Let go of a parameter's gradient, as a hook that runs once it is whole."""
    parameter.grad = None


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations made and nobody has let go of; `own` ones are counted elsewhere."""

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._now, self._phase = 0, "forward"
        self._sizes: dict[int, int] = {}
        self.peaks = {"forward": 0, "loss": 0, "backward": 0}

    def begin(self, phase: str) -> int:
        """Count for another phase from now on, and return what is alive."""
        self._phase = phase
        self.peaks[phase] = max(self.peaks[phase], self._now)
        return self._now

    def begin_backward(self, gradient: Tensor) -> None:
        """Begin the backward pass of the layers, as a hook on the last hidden states."""
        self.begin("backward")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._own:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)
        self.peaks[self._phase] = max(self.peaks[self._phase], self._now)

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class _Dequantized(torch.autograd.Function):
    """A product with a frozen quantized weight: its wide copy lives as long as the product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = shape, dtype
        return x.to(dtype) @ torch.empty(shape, dtype=dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].to(ctx.dtype) @ torch.empty(ctx.shape, dtype=ctx.dtype), None, None


def store_quantized(layers: list[nn.Module], dtype: torch.dtype) -> None:
    """Let linear layers on the meta device compute as those of a quantized base do.

    Args:
        dtype: of the products, and of the wide copy of the weight.
    """
    for layer in layers:
        shape = tuple(layer.weight.shape)
        layer.forward = functools.partial(_product, shape=shape[::-1] if isinstance(layer, Conv1D) else shape, dtype=dtype)


def _product(x: Tensor, *, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return _Dequantized.apply(x, shape, dtype)
