"""What a loss gives the training loop, and the cross-entropy on the labels.

Shapes: B rows, T positions, N valid positions (whose label is not -100), C positions of a chunk,
H width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.training.batches import IGNORE, Batch

CHUNK_POSITIONS = 256
"""Positions projected to the vocabulary at once: the only logits alive."""


class LossSums(NamedTuple):
    """Sums over valid positions in nats; the loop divides by the valid positions of the global batch."""

    total: Tensor
    """What is minimised: a scalar with a graph."""
    terms: dict[str, Tensor]
    """Its parts, each a detached scalar, logged apart."""
    tokens: dict[str, int] = {}  # noqa: RUF012 - never changed
    """Positions behind a term, where they are not all valid ones; of the same terms in each micro-batch on each worker."""


Loss = Callable[[nn.Module, Batch], LossSums]
"""Called with the model and a micro-batch."""


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the causal language model inside an adapter wrapper, or the model itself."""
    # asked of the model itself: PEFT, with bitsandbytes behind it, is 50 MiB of a process that trains without adapters
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of a causal language model's decoder layers."""
    config = causal_lm(model).config
    return next(
        module for module in causal_lm(model).modules() if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )


def valid_hidden(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the last hidden states that predict a label, and the labels.

    The attention mask follows from the position ids: transformers keeps examples apart where they restart.

    Returns:
        hidden_NH and labels_N.
    """
    body = causal_lm(model).get_decoder()
    hidden_BTH = body(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).last_hidden_state
    labels_BT = batch.labels_BT[:, 1:]
    valid_BT = labels_BT != IGNORE
    return hidden_BTH[:, :-1][valid_BT], labels_BT[valid_BT]


def cross_entropy_loss(model: nn.Module, batch: Batch) -> LossSums:
    """Return the summed cross-entropy of the labels; only valid positions are projected to the vocabulary."""
    hidden_NH, labels_N = valid_hidden(model, batch)
    head = causal_lm(model).get_output_embeddings()
    total = head_cross_entropy(hidden_NH, head.weight, head.bias, labels_N)
    return LossSums(total, {"cross_entropy": total.detach()})


def head_cross_entropy(hidden_NH: Tensor, head_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
    """Return the summed cross-entropy of linear(hidden, head, bias), with never more than one chunk of logits alive.

    The gradient is formed in the forward pass, so nothing is projected twice and a frozen head costs no gradient.
    Under autocast the projection runs in its type; softmax and sum always run in float32 or wider.
    """
    kind = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head_VH.dtype
    return _HeadCrossEntropy.apply(hidden_NH, head_VH, bias_V, labels_N, dtype, torch.is_grad_enabled())


class _HeadCrossEntropy(torch.autograd.Function):
    """Sums over chunks; keeps the gradients of its inputs instead of any logits."""

    @staticmethod
    def forward(ctx, hidden_NH, head_VH, bias_V, labels_N, dtype, wants_gradient):
        needs_hidden, needs_head, needs_bias = (need and wants_gradient for need in ctx.needs_input_grad[:3])
        wide = torch.promote_types(dtype, torch.float32)
        grad_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
        grad_VH = torch.zeros_like(head_VH, dtype=wide) if needs_head else None
        grad_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        total = hidden_NH.new_zeros((), dtype=wide)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            weight_VH, bias = head_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for start in range(0, len(labels_N), CHUNK_POSITIONS):
                at = slice(start, start + CHUNK_POSITIONS)
                hidden_CH, labels_C1 = hidden_NH[at].to(dtype), labels_N[at, None]
                logits_CV = F.linear(hidden_CH, weight_VH, bias).to(wide)
                total += logits_CV.logsumexp(-1).sum() - logits_CV.gather(1, labels_C1).sum()
                if not (needs_hidden or needs_head or needs_bias):
                    continue
                grad_CV = logits_CV.softmax(-1).scatter_add_(1, labels_C1, logits_CV.new_full(labels_C1.shape, -1.0))
                if needs_bias:
                    grad_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(dtype)
                if needs_hidden:
                    grad_NH[at] = grad_CV @ weight_VH
                if needs_head:
                    grad_VH += grad_CV.T @ hidden_CH
        ctx.save_for_backward(grad_NH, *(g if g is None else g.to(dtype=head_VH.dtype) for g in (grad_VH, grad_V)))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grads = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None
