"""How far the student's next-token distributions are from the teacher's, without ever holding all logits.

Shapes: N valid positions, C positions of one chunk, H width (student and teacher may differ), V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_POSITIONS = 256
"""Positions projected to the vocabulary at once: the only logits alive."""


class HeadLoss(NamedTuple):
    """Sums over positions, in nats: `total` carries the gradient, `kl` and `ce` are its unweighted terms."""

    total: Tensor
    kl: Tensor
    ce: Tensor


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float) -> Tensor:
    """Return KL(teacher || student) of each position at a temperature, times its square, densely in float32 or wider.

    The square keeps the gradient's size when the temperature changes. This is the reference for `fused_head_loss`.

    Args:
        student_logits_NV: scores before the softmax.
        teacher_logits_NV: the same positions' scores of the teacher; gets no gradient.
        temperature: divides both logits; above 0.

    Returns:
        Nats, shape N, at least 0 up to rounding.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    wide = torch.promote_types(student_logits_NV.dtype, torch.float32)
    log_q_NV = F.log_softmax(student_logits_NV.to(wide) / temperature, dim=-1)
    log_p_NV = F.log_softmax(teacher_logits_NV.detach().to(wide) / temperature, dim=-1)
    return temperature**2 * (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def fused_head_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NH: Tensor,
    teacher_head_VH: Tensor,
    labels_N: Tensor,
    *,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    chunk_positions: int = CHUNK_POSITIONS,
) -> HeadLoss:
    """Return kd_weight * T^2 KL(teacher || student) + ce_weight * cross-entropy, summed over positions.

    Both heads are projected chunk by chunk and the gradient is formed on the way, so that neither all logits nor a
    second projection is needed. A frozen student head costs no weight gradient. Under autocast the projections run
    in its type; softmax and sums always run in float32 or wider.

    Args:
        student_hidden_NH: final hidden states at valid positions.
        student_head_VH: output embedding of the student.
        teacher_hidden_NH: the teacher's, of its own width; gets no gradient.
        teacher_head_VH: output embedding of the teacher; gets no gradient.
        labels_N: the token that follows each position.
        temperature: of the divergence alone; above 0.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.
        chunk_positions: positions whose logits are alive at once.
    """
    options = _Options(temperature, kd_weight, ce_weight, chunk_positions, _projection_dtype(student_head_VH), torch.is_grad_enabled())
    tensors = (student_hidden_NH, student_head_VH, teacher_hidden_NH.detach(), teacher_head_VH.detach(), labels_N)
    return HeadLoss(*_FusedHead.apply(*tensors, options))


class _Options(NamedTuple):
    temperature: float
    kd_weight: float
    ce_weight: float
    chunk_positions: int
    dtype: torch.dtype
    wants_gradient: bool


def _projection_dtype(head_VH: Tensor) -> torch.dtype:
    kind = head_VH.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head_VH.dtype


class _FusedHead(torch.autograd.Function):
    """Sums the loss over chunks; keeps the gradients of its inputs instead of any logits."""

    @staticmethod
    def forward(ctx, student_hidden_NH, student_head_VH, teacher_hidden_NH, teacher_head_VH, labels_N, options):
        needs_hidden, needs_head = (need and options.wants_gradient for need in ctx.needs_input_grad[:2])
        wide = torch.promote_types(options.dtype, torch.float32)
        grad_hidden_NH = torch.zeros_like(student_hidden_NH) if needs_hidden else None
        grad_head_VH = torch.zeros_like(student_head_VH, dtype=wide) if needs_head else None
        sums = student_hidden_NH.new_zeros(2, dtype=wide)
        with torch.autocast(student_hidden_NH.device.type, enabled=False):
            student_VH, teacher_VH = student_head_VH.to(options.dtype), teacher_head_VH.to(options.dtype)
            for start in range(0, len(labels_N), options.chunk_positions):
                at = slice(start, start + options.chunk_positions)
                student_CH = student_hidden_NH[at].to(options.dtype)
                student_CV = (student_CH @ student_VH.T).to(wide)
                teacher_CV = (teacher_hidden_NH[at].to(options.dtype) @ teacher_VH.T).to(wide)
                chunk_sums, grad_CV = _chunk(student_CV, teacher_CV, labels_N[at], options)
                sums += chunk_sums
                grad_CV = grad_CV.to(options.dtype)
                if needs_hidden:
                    grad_hidden_NH[at] = grad_CV @ student_VH
                if needs_head:
                    grad_head_VH += grad_CV.T @ student_CH
        ctx.save_for_backward(grad_hidden_NH, None if grad_head_VH is None else grad_head_VH.to(student_head_VH.dtype))
        kl, ce = sums.unbind()
        total = options.kd_weight * kl + options.ce_weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    def backward(ctx, grad_total, *_):
        hidden_NH, head_VH = ctx.saved_tensors
        scaled = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in (hidden_NH, head_VH))
        return *scaled, None, None, None, None


def _chunk(student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Return [kl, ce] sums and the gradient of their weighted sum by the student's logits; overwrites both logits."""
    ce_C, ce_grad_CV = _cross_entropy(student_CV, labels_C)
    kl_C, grad_CV = _forward_kl(student_CV, teacher_CV, options.temperature)
    grad_CV.mul_(options.kd_weight).add_(ce_grad_CV, alpha=options.ce_weight)
    return torch.stack([kl_C.sum(), ce_C.sum()]), grad_CV


def _cross_entropy(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    label_C1 = labels_C.unsqueeze(-1)
    log_q_CV = F.log_softmax(logits_CV, dim=-1)
    ce_C = -log_q_CV.gather(-1, label_C1).squeeze(-1)
    return ce_C, log_q_CV.exp_().scatter_add_(-1, label_C1, log_q_CV.new_full(label_C1.shape, -1))


def _forward_kl(student_CV: Tensor, teacher_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_q_CV = F.log_softmax(student_CV.div_(temperature), dim=-1)
    log_p_CV = F.log_softmax(teacher_CV.div_(temperature), dim=-1)
    p_CV = log_p_CV.exp()
    kl_C = temperature**2 * torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_q_CV)).clamp_(min=0)
    return kl_C, log_q_CV.exp_().sub_(p_CV).mul_(temperature)
