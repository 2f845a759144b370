"""The loss of distillation, as the training loop calls it.

Shapes: N valid positions, C positions of one chunk, H width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.distillation.balance import Balance
from ray_jobs.distillation.divergence import CHUNK_POSITIONS, Divergence, HeadLoss, fused_head_loss, fused_top_k_loss
from ray_jobs.distillation.hidden_states import HiddenLoss, valid_states
from ray_jobs.distillation.self_check import check_loss
from ray_jobs.distillation.several import fused_several_loss
from ray_jobs.distillation.target_hooks import AsksTargets
from ray_jobs.distillation.targets import OneTarget, SeveralTarget, Target, Targets
from ray_jobs.distillation.topk import TopKTarget
from ray_jobs.training.batches import Batch, Row
from ray_jobs.training.losses import LossSums, causal_lm


class DistillLoss(AsksTargets):
    """kd_weight * divergence + ce_weight * cross-entropy on the labels + hidden.weight * distance of hidden states.

    Each is a term of its own: `kl` for forward KL, else the divergence's kind; `ce`; `hidden`. Without gradients (in
    evaluation) the divergence is forward KL at temperature 1, the plain `kl` in nats, whatever is trained, and nothing is
    balanced, so that runs compare; and `ce_teacher` gives the teacher's own cross-entropy. Of several teachers the divergences
    are added by their shares in each position, as is `ce_teacher`, and each divergence is a term too (`kl_NAME`), per
    token that this teacher teaches.

    Args:
        targets: the teacher's word on each batch.
        divergence: which one is trained, and its temperature.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.
        hidden: the loss on hidden states, where there is one.
        balanced: whether the further terms are brought to the size of the divergence before the weights apply.
        num_tokens: tokens of the vocabulary; rows of a head beyond are padding. None takes the rows that both heads have.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        divergence: Divergence,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        hidden: HiddenLoss | None = None,
        balanced: bool = False,
        num_tokens: int | None = None,
    ):
        self.targets, self.divergence = targets, divergence
        self.kd_weight, self.ce_weight, self.hidden, self.num_tokens = kd_weight, ce_weight, hidden, num_tokens
        self.balance = Balance(term_of(divergence)) if balanced else None

    def __call__(self, model: nn.Module, batch: Batch) -> LossSums:
        """Return the sums over the batch's valid positions."""
        return self.against(self.ask(batch), model, batch)

    def against(self, target: Target, model: nn.Module, batch: Batch) -> LossSums:
        """Return the sums over the batch's valid positions, given the teacher's word on them."""
        training = torch.is_grad_enabled()
        hidden_NH, labels_N, mine_NH = valid_states(model, batch, self.hidden.student_layers if self.hidden else ())
        head_VH = causal_lm(model).get_output_embeddings().weight
        divergence = self.divergence if training else Divergence()
        loss = self.head_loss(hidden_NH, head_VH, target, labels_N, divergence)
        total, terms = loss.total, {term_of(divergence): loss.divergence, "ce": loss.ce}
        each = {f"{term_of(divergence)}_{name}": found for name, found in loss.each.items()}
        if self.hidden:
            theirs_NH = target.layers_NH if mine_NH else (target.hidden_NH,)
            distance = self.hidden(model, mine_NH or (hidden_NH,), theirs_NH)
            total = total + self.hidden.weight * self._factor("hidden") * distance
            terms["hidden"] = distance.detach()
        if not training:
            terms["ce_teacher"] = _teacher_ce(target, labels_N)
        terms |= {name: found.divergence for name, found in each.items()}
        return LossSums(total, terms, {name: found.tokens for name, found in each.items()})

    def head_loss(self, hidden_NH: Tensor, head_VH: Tensor, target: Target, labels_N: Tensor, divergence: Divergence) -> HeadLoss:
        """Return divergence and cross-entropy, weighted, given the student's final hidden states and its head."""
        options = {"kd_weight": self.kd_weight, "ce_weight": self.ce_weight * self._factor("ce"), "num_tokens": self.num_tokens}
        if isinstance(target, SeveralTarget):
            return fused_several_loss(hidden_NH, head_VH, target, labels_N, divergence=divergence, **options)
        if isinstance(target, TopKTarget):
            given, fused = target.at(divergence.temperature), fused_top_k_loss
        else:
            given, fused = (target.hidden_NH, target.head_VH), fused_head_loss
        return fused(hidden_NH, head_VH, *given, labels_N, divergence=divergence, **options)

    def check(self, model: nn.Module, rows: list[Row], dtype: torch.dtype) -> None:
        """Refuse to train where `check_loss` finds this loss wrong."""
        check_loss(self, model, rows, dtype)

    def after_step(self, terms: dict[str, float]) -> None:
        """Take the terms' means of a step over all workers."""
        if self.balance:
            self.balance.after_step(terms)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps of the loss."""
        return self.balance.state() if self.balance else {}

    def load_state(self, state: dict[str, float]) -> None:
        """Put back what `state` returned."""
        self.after_step(state)

    def _factor(self, term: str) -> float:
        return self.balance.factor(term) if self.balance and torch.is_grad_enabled() else 1.0


def term_of(divergence: Divergence) -> str:
    """Return the name under which a divergence is logged."""
    return "kl" if divergence.kind == "forward_kl" else divergence.kind


def _teacher_ce(target: Target, labels_N: Tensor) -> Tensor:
    if not isinstance(target, SeveralTarget):
        return _ce_of(target, labels_N).sum()
    parts = [part for part in target.parts.values() if part is not None]
    total = torch.zeros((), device=labels_N.device)
    for part in parts:
        total += (part.shares_M * _ce_of(part.target, labels_N[part.places_M])).sum()
    return total


def _ce_of(target: OneTarget, labels_N: Tensor) -> Tensor:
    if isinstance(target, TopKTarget):
        return -target.label_log_p_N
    found = [
        F.cross_entropy((hidden_CH @ target.head_VH.T).float(), labels_C, reduction="none")
        for hidden_CH, labels_C in zip(target.hidden_NH.split(CHUNK_POSITIONS), labels_N.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(found)
