"""How far the student's next-token distributions are from the teacher's, without ever holding all logits.

Shapes: N valid positions, C positions of one chunk, H width (student and teacher may differ), V vocabulary, K kept tokens.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.closed_forms import forward_kl_, jsd_, reverse_kl_, skewed_kl_, total_variation_
from ray_jobs.distillation.fused_head import FusedHead, Settings, Teacher, TopKTeacher, WholeTeacher

CHUNK_POSITIONS = 128
"""Positions projected to the vocabulary at once: the only logits alive. On a CPU 64 took a tenth longer, 256 no less."""

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"]


class Divergence(NamedTuple):
    """Which divergence, at which temperature.

    Both distributions are softened by the temperature T, and the result is multiplied by `scale`, so that its gradient
    keeps its size when T changes: T^2 for all but the total variation. At high T the gaps q - p shrink as 1/T; the
    others are of second order in them and total variation is of first, so that T, not T^2, is what keeps it level.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2 (why the square).
    """

    kind: Kind = "forward_kl"
    beta: float = 0.5
    """Weight of the teacher in the mixture of jsd, between 0 and 1."""
    skew: float = 0.1
    """Weight of the teacher in the mixture of skewed_kl, between 0 and 1."""
    temperature: float = 1.0
    """Above 0."""

    @property
    def scale(self) -> float:
        """What the softened divergence is multiplied by."""
        return self.temperature if self.kind == "total_variation" else self.temperature**2

    def compare_(self, log_q_CV: Tensor, log_p_CV: Tensor) -> Tensor:
        """Return the divergence of log-probabilities, shape C; overwrites log_q with its gradient by the student's softened logits."""
        if self.kind == "jsd":
            return jsd_(log_q_CV, log_p_CV, beta=self.beta)
        if self.kind == "skewed_kl":
            return skewed_kl_(log_q_CV, log_p_CV, skew=self.skew)
        forms = {"forward_kl": forward_kl_, "reverse_kl": reverse_kl_, "total_variation": total_variation_}
        return forms[self.kind](log_q_CV, log_p_CV)


class HeadLoss(NamedTuple):
    """Sums over positions: `total` carries the gradient; `divergence` (scaled) and `ce`, in nats, are its unweighted terms."""

    total: Tensor
    divergence: Tensor
    ce: Tensor
    each: "dict[str, OfTeacher]" = {}  # noqa: RUF012 - never changed
    """By name, of several teachers."""


class OfTeacher(NamedTuple):
    """One of several teachers: its divergence, summed over the positions that it teaches, and their number."""

    divergence: Tensor
    tokens: int


def fused_head_loss(  # noqa: PLR0913 - what two models say, and plain numbers
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
    chunk_positions: int = CHUNK_POSITIONS,
) -> HeadLoss:
    """Return kd_weight * divergence + ce_weight * cross-entropy, summed over positions.

    Both heads are projected chunk by chunk and the gradient is formed on the way, so that neither all logits nor a
    second projection is needed. A frozen student head costs no weight gradient. Under autocast the projections run
    in its type; softmax, sums and the head's gradient over the chunks are float32 or wider.

    Args:
        student_hidden_NH: final hidden states at valid positions.
        student_head_VH: output embedding of the student.
        teacher_hidden_NH: the teacher's, of its own width; gets no gradient.
        teacher_head_VH: output embedding of the teacher; gets no gradient.
        labels_N: the token that follows each position.
        divergence: which one, and its temperature.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy, which is always at temperature 1.
        num_tokens: tokens of the vocabulary; rows of a head beyond are padding. None takes the rows that both heads have.
        chunk_positions: positions whose logits are alive at once.
    """
    num_tokens = num_tokens or min(len(student_head_VH), len(teacher_head_VH))
    teacher = whole_teacher(teacher_hidden_NH, teacher_head_VH, divergence, num_tokens=num_tokens, dtype=projection_dtype(student_head_VH))
    weights = (divergence, kd_weight, ce_weight, num_tokens, chunk_positions)
    return head_loss_against(teacher, student_hidden_NH, student_head_VH, labels_N, *weights)


def fused_top_k_loss(  # noqa: PLR0913 - what two models say, and plain numbers
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
    chunk_positions: int = CHUNK_POSITIONS,
) -> HeadLoss:
    """Return `fused_head_loss` for a teacher of whom only the likeliest tokens are known.

    The divergence is taken over K + 1 buckets: each kept token, and all others together. It is never above that over
    the whole vocabulary (data processing inequality).

    Args:
        token_ids_NK: the kept tokens, all different at a position, fewer than the vocabulary.
        log_p_NK: the teacher's log-probabilities of them, at the divergence's temperature.
        log_tail_N: log of the sum of all other tokens' probabilities.

    Raises:
        ConfigError: all tokens of the vocabulary are kept, so that nothing is left for the tail.
    """
    num_tokens = num_tokens or len(student_head_VH)
    teacher = top_k_teacher(token_ids_NK, log_p_NK, log_tail_N, divergence, num_tokens=num_tokens)
    weights = (divergence, kd_weight, ce_weight, num_tokens, chunk_positions)
    return head_loss_against(teacher, student_hidden_NH, student_head_VH, labels_N, *weights)


def whole_teacher(hidden_NH: Tensor, head_VH: Tensor, divergence: Divergence, *, num_tokens: int, dtype: torch.dtype) -> WholeTeacher:
    """Return a teacher known by its hidden states and its head, for `head_loss_against`.

    Args:
        dtype: of the projections.
    """
    return WholeTeacher(hidden_NH.detach(), head_VH.detach()[:num_tokens].to(dtype), divergence.compare_, divergence.temperature)


def top_k_teacher(token_ids_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor, divergence: Divergence, *, num_tokens: int) -> TopKTeacher:
    """Return a teacher known by its likeliest tokens, for `head_loss_against`.

    Raises:
        ConfigError: all tokens of the vocabulary are kept, so that nothing is left for the tail.
    """
    if token_ids_NK.shape[1] >= num_tokens:
        raise ConfigError(
            f"top-k targets keep {token_ids_NK.shape[1]} of {num_tokens} tokens: keep fewer (distill.cache.top_k), or hidden states"
        )
    return TopKTeacher(token_ids_NK, log_p_NK, log_tail_N, divergence.compare_)


def head_loss_against(
    teacher: Teacher,
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    divergence: Divergence,
    kd_weight: float,
    ce_weight: float,
    num_tokens: int,
    chunk_positions: int = CHUNK_POSITIONS,
) -> HeadLoss:
    """Return the loss against any teacher of the fused head; arguments as in `fused_head_loss`."""
    settings = Settings(
        temperature=divergence.temperature,
        kd_weight=kd_weight * divergence.scale,
        ce_weight=ce_weight,
        num_tokens=num_tokens,
        chunk_positions=chunk_positions,
        dtype=projection_dtype(head_VH),
        wants_gradient=torch.is_grad_enabled(),
    )
    total, softened, ce = FusedHead.apply(hidden_NH, head_VH, labels_N, teacher, settings)
    return HeadLoss(total, softened * divergence.scale, ce)


def projection_dtype(head_VH: Tensor) -> torch.dtype:
    """Return the type in which hidden states meet a student's head: its own, or that of autocast."""
    kind = head_VH.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head_VH.dtype
