"""The divergences once more, densely and by autograd: what the fast forms are held to, in tests and at a job's start.

Shapes: N positions, H width, V vocabulary, K kept tokens.
"""

import torch
from torch import Tensor

from ray_jobs.distillation.divergence import Divergence, HeadLoss


def dense_divergence(student_logits_NV: Tensor, teacher_logits_NV: Tensor, divergence: Divergence) -> Tensor:
    """Return the scaled divergence of each position, shape N, in float32 or wider; `divergence` says what the scale is.

    Args:
        student_logits_NV: scores before the softmax.
        teacher_logits_NV: the same positions' scores of the teacher; gets no gradient.
        divergence: which one, and its temperature.
    """
    wide = torch.promote_types(student_logits_NV.dtype, torch.float32)
    log_q_NV = torch.log_softmax(student_logits_NV.to(wide) / divergence.temperature, dim=-1)
    log_p_NV = torch.log_softmax(teacher_logits_NV.detach().to(wide) / divergence.temperature, dim=-1)
    return divergence.scale * _between(log_q_NV, log_p_NV, divergence)


def dense_top_k_divergence(
    student_logits_NV: Tensor, token_ids_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor, divergence: Divergence
) -> Tensor:
    """Return the scaled divergence of each position over K + 1 buckets, shape N: the kept tokens, and all others as one.

    Args:
        student_logits_NV: scores before the softmax.
        token_ids_NK: the kept tokens.
        log_p_NK: the teacher's log-probabilities of them, at the divergence's temperature.
        log_tail_N: log of the sum of all other tokens' probabilities.
        divergence: which one, and its temperature.
    """
    q_NV = torch.softmax(student_logits_NV / divergence.temperature, dim=-1)
    kept_NK = q_NV.gather(-1, token_ids_NK)
    tail_N1 = q_NV.scatter(-1, token_ids_NK, 0.0).sum(-1, keepdim=True)
    log_p_NK = torch.log_softmax(torch.cat([log_p_NK, log_tail_N.unsqueeze(-1)], dim=-1), dim=-1)
    return divergence.scale * _between(torch.cat([kept_NK, tail_N1], dim=-1).log(), log_p_NK, divergence)


def dense_head_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NH: Tensor,
    teacher_head_VH: Tensor,
    labels_N: Tensor,
    *,
    divergence: Divergence,
    kd_weight: float,
    ce_weight: float,
    num_tokens: int | None = None,
) -> HeadLoss:
    """Return what `fused_head_loss` returns, from all logits at once."""
    num_tokens = num_tokens or min(len(student_head_VH), len(teacher_head_VH))
    student_NV = student_hidden_NH @ student_head_VH[:num_tokens].T
    between_N = dense_divergence(student_NV, teacher_hidden_NH @ teacher_head_VH[:num_tokens].T, divergence)
    return _weighted(between_N, student_NV, labels_N, kd_weight, ce_weight)


def dense_top_k_loss(  # noqa: PLR0913 - what two models say, and plain numbers
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    token_ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor,
    labels_N: Tensor,
    *,
    divergence: Divergence,
    kd_weight: float,
    ce_weight: float,
    num_tokens: int | None = None,
) -> HeadLoss:
    """Return what `fused_top_k_loss` returns, from all logits at once."""
    student_NV = student_hidden_NH @ student_head_VH[:num_tokens].T
    between_N = dense_top_k_divergence(student_NV, token_ids_NK, log_p_NK, log_tail_N, divergence)
    return _weighted(between_N, student_NV, labels_N, kd_weight, ce_weight)


def _between(log_q_NV: Tensor, log_p_NV: Tensor, divergence: Divergence) -> Tensor:
    if divergence.kind == "forward_kl":
        return _kl(log_p_NV, log_q_NV)
    if divergence.kind == "reverse_kl":
        return _kl(log_q_NV, log_p_NV)
    if divergence.kind == "total_variation":
        return (log_q_NV.exp() - log_p_NV.exp()).abs().sum(-1) / 2
    share = divergence.beta if divergence.kind == "jsd" else divergence.skew
    log_shares = torch.tensor([share, 1 - share], dtype=log_q_NV.dtype, device=log_q_NV.device).log()
    log_m_NV = torch.logaddexp(log_p_NV + log_shares[0], log_q_NV + log_shares[1])
    if divergence.kind == "skewed_kl":
        return _kl(log_p_NV, log_m_NV)
    return share * _kl(log_p_NV, log_m_NV) + (1 - share) * _kl(log_q_NV, log_m_NV)


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


def _weighted(between_N: Tensor, student_NV: Tensor, labels_N: Tensor, kd_weight: float, ce_weight: float) -> HeadLoss:
    divergence, ce = between_N.sum(), torch.nn.functional.cross_entropy(student_NV, labels_N, reduction="sum")
    return HeadLoss(kd_weight * divergence + ce_weight * ce, divergence, ce)
