"""The loss of distillation, as the training loop calls it.

Shapes: N valid positions, C positions of one chunk, H width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.distillation.divergence import CHUNK_POSITIONS, Divergence, HeadLoss, fused_head_loss, fused_top_k_loss
from ray_jobs.distillation.target_hooks import AsksTargets
from ray_jobs.distillation.targets import Target, Targets
from ray_jobs.distillation.topk import TopKTarget
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums, causal_lm, valid_hidden


class DistillLoss(AsksTargets):
    """kd_weight * divergence(teacher, student) + ce_weight * cross-entropy on the labels, each a term of its own.

    The divergence's term is `kl` for forward KL, else its kind. Without gradients (in evaluation) it is forward KL at
    temperature 1, the plain `kl` in nats, whatever is trained, so that runs compare; and `ce_teacher` gives the
    teacher's own cross-entropy.

    Args:
        targets: the teacher's word on each batch.
        divergence: which one is trained, and its temperature.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.
        num_tokens: tokens of the vocabulary; rows of a head beyond are padding. None takes the rows that both heads have.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self, targets: Targets, *, divergence: Divergence, kd_weight: float = 1.0, ce_weight: float = 0.0, num_tokens: int | None = None
    ):
        self.targets, self.divergence = targets, divergence
        self.kd_weight, self.ce_weight, self.num_tokens = kd_weight, ce_weight, num_tokens

    def __call__(self, model: nn.Module, batch: Batch) -> LossSums:
        """Return the sums over the batch's valid positions."""
        hidden_NH, labels_N = valid_hidden(model, batch)
        target = self.targets.of(batch)
        head_VH = causal_lm(model).get_output_embeddings().weight
        divergence = self.divergence if torch.is_grad_enabled() else Divergence()
        loss = self._head_loss(hidden_NH, head_VH, target, labels_N, divergence)
        terms = {term_of(divergence): loss.divergence, "ce": loss.ce}
        if not torch.is_grad_enabled():
            terms["ce_teacher"] = _teacher_ce(target, labels_N)
        return LossSums(loss.total, terms)

    def _head_loss(self, hidden_NH: Tensor, head_VH: Tensor, target: Target, labels_N: Tensor, divergence: Divergence) -> HeadLoss:
        options = {"kd_weight": self.kd_weight, "ce_weight": self.ce_weight, "num_tokens": self.num_tokens}
        if not isinstance(target, TopKTarget):
            given, fused = (target.hidden_NH, target.head_VH), fused_head_loss
        else:
            given, fused = target.at(divergence.temperature), fused_top_k_loss
        return fused(hidden_NH, head_VH, *given, labels_N, divergence=divergence, **options)


def term_of(divergence: Divergence) -> str:
    """Return the name under which a divergence is logged."""
    return "kl" if divergence.kind == "forward_kl" else divergence.kind


def _teacher_ce(target: Target, labels_N: Tensor) -> Tensor:
    if isinstance(target, TopKTarget):
        return -target.label_log_p_N.sum()
    total = target.hidden_NH.new_zeros((), dtype=torch.float32)
    for hidden_CH, labels_C in zip(target.hidden_NH.split(CHUNK_POSITIONS), labels_N.split(CHUNK_POSITIONS), strict=True):
        total += F.cross_entropy((hidden_CH @ target.head_VH.T).float(), labels_C, reduction="sum")
    return total
