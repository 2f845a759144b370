"""The loss of distillation, as the training loop calls it."""

import torch
from torch import nn

from ray_jobs.distillation.divergence import fused_head_loss
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums, causal_lm, valid_hidden


class DistillLoss:
    """kd_weight * T^2 KL(teacher || student) + ce_weight * cross-entropy on the labels; terms `kl` and `ce` apart.

    Without gradients (in evaluation) the divergence is taken at temperature 1: the plain KL in nats, which compares
    across runs whatever temperature they train at.

    Args:
        teacher: gives hidden states and a head.
        kd_temperature: T of the training loss.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    def __init__(self, teacher: WorkerTeacher, *, kd_temperature: float, kd_weight: float, ce_weight: float):
        self.teacher = teacher
        self.kd_temperature, self.kd_weight, self.ce_weight = kd_temperature, kd_weight, ce_weight

    def __call__(self, model: nn.Module, batch: Batch) -> LossSums:
        """Return the sums over the batch's valid positions."""
        hidden_NH, labels_N = valid_hidden(model, batch)
        loss = fused_head_loss(
            hidden_NH,
            causal_lm(model).get_output_embeddings().weight,
            self.teacher.hidden(batch),
            self.teacher.head_VH,
            labels_N,
            temperature=self.kd_temperature if torch.is_grad_enabled() else 1.0,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
        )
        return LossSums(loss.total, {"kl": loss.kl, "ce": loss.ce})
