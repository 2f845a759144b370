"""The student's output head and its loss in one: logits come and go chunk by chunk, and leave their gradient behind.

Shapes: N valid positions, C positions of one chunk, B positions of one block of it, H width (student and teacher may
differ), V vocabulary, K kept tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK_POSITIONS = 8
"""Positions whose elementwise work is done at once on a CPU: they stay in its cache, which halved that time against whole chunks."""
SCALED_ROWS = 4096
"""Rows of a gradient in 16 bits that are scaled at once in float32."""

Compare = Callable[[Tensor, Tensor], Tensor]
"""Returns the divergence of log-probabilities (student, teacher) of each position; overwrites the student's with its gradient."""


class Chunk(Protocol):
    """A teacher's word on the positions of one chunk."""

    def compare_(self, log_q_BV: Tensor, rows: slice) -> Tensor:
        """Return the divergence at some rows of the chunk, shape B; overwrites the student's log-probabilities with its gradient."""


class Teacher(Protocol):
    """A teacher's word on all valid positions."""

    def chunk(self, at: slice) -> Chunk:
        """Return its word on some of them."""


class Settings(NamedTuple):
    """Plain numbers of one call."""

    temperature: float
    kd_weight: float
    """With the divergence's scale."""
    ce_weight: float
    num_tokens: int
    chunk_positions: int
    dtype: torch.dtype
    """Of the projections."""
    wants_gradient: bool


class FusedHead(torch.autograd.Function):
    """Sums the loss over chunks, and keeps the gradients of its inputs instead of any logits."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, teacher: Teacher, settings: Settings):
        """Return the weighted sum, which has a gradient, and the sums of the unscaled divergence and of the cross-entropy."""
        needs_hidden, needs_head = (need and settings.wants_gradient for need in ctx.needs_input_grad[:2])
        wide = torch.promote_types(settings.dtype, torch.float32)
        grad_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
        grad_VH = torch.zeros_like(head_VH, dtype=wide) if needs_head else None
        sums = hidden_NH.new_zeros(2, dtype=wide)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            weight_VH = head_VH[: settings.num_tokens].to(settings.dtype)
            for start in range(0, len(labels_N), settings.chunk_positions):
                at = slice(start, start + settings.chunk_positions)
                hidden_CH = hidden_NH[at].to(settings.dtype)
                logits_CV = (hidden_CH @ weight_VH.T).to(wide)
                sums += _chunk(logits_CV, teacher.chunk(at), labels_N[at], settings)
                grad_CV = logits_CV.to(settings.dtype)
                if needs_hidden:
                    grad_NH[at] = grad_CV @ weight_VH
                if needs_head:
                    _add_product_(grad_VH[: settings.num_tokens], grad_CV.T, hidden_CH)
                del logits_CV, grad_CV  # else this chunk's would be alive beside the next one's
        ctx.save_for_backward(grad_NH, None if grad_VH is None else grad_VH.to(head_VH.dtype))
        divergence, ce = sums.unbind()
        ctx.mark_non_differentiable(divergence, ce)
        return settings.kd_weight * divergence + settings.ce_weight * ce, divergence, ce

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_):
        """Scale the gradients that the forward pass left, where they lie: torch refuses a second backward pass through them."""
        scaled = (None if grad is None else scale_(grad, grad_total) for grad in ctx.saved_tensors)
        return *scaled, None, None, None


def scale_(grad_NH: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place by a number that is not rounded to the gradient's type first: that would bend the whole gradient one way."""
    if grad_NH.dtype == factor.dtype:
        return grad_NH.mul_(factor)
    for rows_NH in grad_NH.split(SCALED_ROWS):  # no second gradient in the factor's type
        rows_NH.copy_(rows_NH.to(factor.dtype).mul_(factor))
    return grad_NH


class WholeTeacher(NamedTuple):
    """A teacher whose hidden states and head give all of its logits."""

    hidden_NH: Tensor
    head_VH: Tensor
    """In the type of the projections."""
    compare_: Compare
    temperature: float

    def chunk(self, at: slice) -> "_WholeChunk":
        """Project some positions."""
        return _WholeChunk(self.hidden_NH[at].to(self.head_VH.dtype) @ self.head_VH.T, self)


class _WholeChunk(NamedTuple):
    logits_CV: Tensor
    teacher: WholeTeacher

    def compare_(self, log_q_BV: Tensor, rows: slice) -> Tensor:
        """Return the divergence at some rows."""
        log_p_BV = _soften_(self.logits_CV[rows].to(log_q_BV.dtype), self.teacher.temperature)
        return self.teacher.compare_(log_q_BV, log_p_BV)


class TopKTeacher(NamedTuple):
    """A teacher of whom the likeliest tokens are known, and the sum of all others."""

    token_ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor
    compare_: Compare

    def chunk(self, at: slice) -> "_TopKChunk":
        """Return the buckets of some positions, the tail last."""
        log_p_CK = torch.cat([self.log_p_NK[at], self.log_tail_N[at].unsqueeze(-1)], dim=-1)
        return _TopKChunk(self.token_ids_NK[at].long(), log_p_CK, self.compare_)


class _TopKChunk(NamedTuple):
    token_ids_CK: Tensor
    log_p_CK: Tensor
    compare_buckets_: Compare

    def compare_(self, log_q_BV: Tensor, rows: slice) -> Tensor:
        """Return the divergence over buckets at some rows."""
        ids_BK = self.token_ids_CK[rows]
        kept_BK = log_q_BV.gather(-1, ids_BK)
        log_q_BV.scatter_(-1, ids_BK, float("-inf"))
        rest_B1 = log_q_BV.logsumexp(-1, keepdim=True)
        buckets_BK = _log_softmax_(torch.cat([kept_BK, rest_B1], dim=-1))
        # a tail of nothing has a log of minus infinity, and 0 * infinity is not a number
        floor = math.log(torch.finfo(log_q_BV.dtype).tiny)
        log_p_BK = self.log_p_CK[rows].to(log_q_BV.dtype).clamp(min=floor)
        divergence_B = self.compare_buckets_(buckets_BK, _log_softmax_(log_p_BK))
        # the tail's gradient is shared among its tokens by their part in it
        log_q_BV.sub_(rest_B1).exp_().mul_(buckets_BK[:, -1:]).scatter_(-1, ids_BK, buckets_BK[:, :-1])
        return divergence_B


def _chunk(logits_CV: Tensor, chunk: Chunk, labels_C: Tensor, settings: Settings) -> Tensor:
    """Return the sums of divergence and cross-entropy; overwrites the logits with the gradient of the weighted sum."""
    block = len(labels_C) if logits_CV.is_cuda else max(BLOCK_POSITIONS, torch.get_num_threads())
    sums = logits_CV.new_zeros(2)
    for start in range(0, len(labels_C), block):
        rows = slice(start, start + block)
        sums += _block(logits_CV[rows], chunk, rows, labels_C[rows].unsqueeze(-1), settings)
    return sums


def _block(logits_BV: Tensor, chunk: Chunk, rows: slice, labels_B1: Tensor, settings: Settings) -> Tensor:
    log_q_BV = _log_softmax_(logits_BV)
    ce = -log_q_BV.gather(-1, labels_B1).sum()
    q_BV = log_q_BV.exp() if settings.ce_weight else None
    if settings.temperature != 1:
        _soften_(log_q_BV, settings.temperature)
    divergence = chunk.compare_(log_q_BV, rows).clamp_(min=0).sum()
    grad_BV = log_q_BV.mul_(settings.kd_weight / settings.temperature)
    if q_BV is not None:
        grad_BV.add_(q_BV, alpha=settings.ce_weight)
        grad_BV.scatter_add_(-1, labels_B1, grad_BV.new_full(labels_B1.shape, -settings.ce_weight))
    return torch.stack([divergence, ce])


def _soften_(logits_BV: Tensor, temperature: float) -> Tensor:
    return _log_softmax_(logits_BV.div_(temperature) if temperature != 1 else logits_BV)


def _log_softmax_(logits_BV: Tensor) -> Tensor:
    # a row is read to its end before it is written, so that it can be its own output
    return torch.log_softmax(logits_BV, dim=-1, out=logits_BV)


def _add_product_(sum_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    if left_VC.dtype == sum_VH.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    else:
        sum_VH += left_VC @ right_CH
