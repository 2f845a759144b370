"""The loss of distillation, as the training loop calls it.

Shapes: N valid positions, C positions of one chunk, H width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.distillation.divergence import CHUNK_POSITIONS, fused_head_loss
from ray_jobs.distillation.target_hooks import AsksTargets
from ray_jobs.distillation.targets import HiddenTarget, Targets
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums, causal_lm, valid_hidden


class DistillLoss(AsksTargets):
    """kd_weight * T^2 KL(teacher || student) + ce_weight * cross-entropy on the labels; terms `kl` and `ce` apart.

    Without gradients (in evaluation) the divergence is taken at temperature 1, the plain KL in nats, which compares
    across runs whatever temperature they train at; and `ce_teacher` gives the teacher's own cross-entropy.

    Args:
        targets: the teacher's word on each batch.
        kd_temperature: T of the training loss.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    def __init__(self, targets: Targets, *, kd_temperature: float, kd_weight: float, ce_weight: float):
        self.targets = targets
        self.kd_temperature, self.kd_weight, self.ce_weight = kd_temperature, kd_weight, ce_weight

    def __call__(self, model: nn.Module, batch: Batch) -> LossSums:
        """Return the sums over the batch's valid positions."""
        training = torch.is_grad_enabled()
        hidden_NH, labels_N = valid_hidden(model, batch)
        target = self.targets.of(batch)
        loss = fused_head_loss(
            hidden_NH,
            causal_lm(model).get_output_embeddings().weight,
            target.hidden_NH,
            target.head_VH,
            labels_N,
            temperature=self.kd_temperature if training else 1.0,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
        )
        terms = {"kl": loss.kl, "ce": loss.ce}
        return LossSums(loss.total, terms if training else terms | {"ce_teacher": _teacher_ce(target, labels_N)})


def _teacher_ce(target: HiddenTarget, labels_N: Tensor) -> Tensor:
    total = target.hidden_NH.new_zeros((), dtype=torch.float32)
    for hidden_CH, labels_C in zip(target.hidden_NH.split(CHUNK_POSITIONS), labels_N.split(CHUNK_POSITIONS), strict=True):
        total += F.cross_entropy((hidden_CH @ target.head_VH.T).float(), labels_C, reduction="sum")
    return total
