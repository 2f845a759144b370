"""Universal logit distillation: sorted probabilities are compared where teacher and student, of two tokenizers, have read the same text.

Shapes: N the teacher's valid positions, M aligned positions, C positions of one chunk, H width, V and U vocabularies of
student and teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.fused_head import scale_
from ray_jobs.distillation.retokenize import Retokenizer
from ray_jobs.distillation.target_hooks import AsksTargets
from ray_jobs.distillation.targets import HiddenTarget, Targets
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums, causal_lm, head_cross_entropy, valid_hidden

CHUNK_POSITIONS = 128
"""Positions projected to both vocabularies at once: the only logits alive."""


class UldLoss(AsksTargets):
    """kd_weight * the sum of |sorted q - sorted p| at aligned positions + ce_weight * cross-entropy on the student's labels.

    Terms are `uld` and `ce`; an evaluation takes `uld` at temperature 1. As the loop divides by the teacher's valid
    positions, all figures are per token of the teacher, and cross-entropies of students with other tokenizers compare.

    Args:
        targets: the teacher's hidden states at its own positions.
        retokenizer: gives the student's batch and where it meets the teacher's.
        kd_temperature: T of the training loss; the distance is of first order in the probabilities, so T is its factor too.
        kd_weight: weight of the distance.
        ce_weight: weight of the cross-entropy.

    Source:
        Boizard et al. 2024, arXiv:2402.12030, section 3.
    """

    def __init__(self, targets: Targets, retokenizer: Retokenizer, *, kd_temperature: float, kd_weight: float, ce_weight: float):
        self.targets, self.retokenizer = targets, retokenizer
        self.kd_temperature, self.kd_weight, self.ce_weight = kd_temperature, kd_weight, ce_weight

    def __call__(self, model: nn.Module, batch: Batch) -> LossSums:
        """Return the sums over a batch in the teacher's tokens.

        Raises:
            ConfigError: the targets are compressed, which leaves nothing to sort.
        """
        own, teacher_at_M, student_at_M = self.retokenizer(batch)
        hidden_NH, labels_N = valid_hidden(model, own)
        target = self.ask(batch)
        if not isinstance(target, HiddenTarget):
            raise ConfigError('distill.vocabulary = "uld" sorts whole distributions: use distill.cache.keep = "hidden"')
        head = causal_lm(model).get_output_embeddings()
        ce = head_cross_entropy(hidden_NH, head.weight, head.bias, labels_N)
        temperature = self.kd_temperature if torch.is_grad_enabled() else 1.0
        uld = sorted_distance(hidden_NH[student_at_M], head.weight, target.hidden_NH[teacher_at_M], target.head_VH, temperature=temperature)
        return LossSums(self.kd_weight * uld + self.ce_weight * ce, {"uld": uld.detach(), "ce": ce.detach()})


def sorted_distance(
    student_hidden_MH: Tensor, student_head_VH: Tensor, teacher_hidden_MH: Tensor, teacher_head_UH: Tensor, *, temperature: float
) -> Tensor:
    """Return T * the sum over positions of the L1 distance between both sorted distributions, the shorter padded with zeros.

    This is the Wasserstein-1 distance under the 0/1 cost of equal ranks. Both heads are projected chunk by chunk and
    the gradient is formed on the way; the teacher gets none.
    """
    kind = student_head_VH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else student_head_VH.dtype
    given = (student_hidden_MH, student_head_VH, teacher_hidden_MH.detach(), teacher_head_UH.detach())
    return _SortedDistance.apply(*given, temperature, dtype, torch.is_grad_enabled())


class _SortedDistance(torch.autograd.Function):
    """Sums over chunks; keeps the gradients of the student's inputs instead of any logits."""

    @staticmethod
    def forward(ctx, hidden_MH, head_VH, teacher_MH, teacher_UH, temperature, dtype, wants_gradient):
        needs_hidden, needs_head = (need and wants_gradient for need in ctx.needs_input_grad[:2])
        wide = torch.promote_types(dtype, torch.float32)
        grad_MH = torch.zeros_like(hidden_MH) if needs_hidden else None
        grad_VH = torch.zeros_like(head_VH, dtype=wide) if needs_head else None
        total = hidden_MH.new_zeros((), dtype=wide)
        with torch.autocast(hidden_MH.device.type, enabled=False):
            weight_VH, teacher_weight_UH = head_VH.to(dtype), teacher_UH.to(dtype)
            for start in range(0, len(hidden_MH), CHUNK_POSITIONS):
                at = slice(start, start + CHUNK_POSITIONS)
                hidden_CH = hidden_MH[at].to(dtype)
                q_CV = ((hidden_CH @ weight_VH.T).to(wide) / temperature).softmax(-1)
                p_CU = ((teacher_MH[at].to(dtype) @ teacher_weight_UH.T).to(wide) / temperature).softmax(-1)
                distance, grad_CV = _compare(q_CV, p_CU)
                total += temperature * distance
                grad_CV = grad_CV.to(dtype)  # T of the factor and 1 / T of the softening cancel
                if needs_hidden:
                    grad_MH[at] = grad_CV @ weight_VH
                if needs_head:
                    grad_VH += grad_CV.T @ hidden_CH
        ctx.save_for_backward(grad_MH, None if grad_VH is None else grad_VH.to(head_VH.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grads = [None if grad is None else scale_(grad, grad_total) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _compare(q_CV: Tensor, p_CU: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed distance and its gradient by the student's softened logits."""
    num_student, num_teacher = q_CV.shape[-1], p_CU.shape[-1]
    sorted_CV, order_CV = q_CV.sort(dim=-1, descending=True)
    ranked_CU = p_CU.sort(dim=-1, descending=True).values
    gap_CW = F.pad(sorted_CV, (0, max(0, num_teacher - num_student))) - F.pad(ranked_CU, (0, max(0, num_student - num_teacher)))
    sign_CV = torch.empty_like(q_CV).scatter_(-1, order_CV, gap_CW[:, :num_student].sign())
    mean_C1 = (q_CV * sign_CV).sum(-1, keepdim=True)
    return gap_CW.abs().sum(), q_CV * (sign_CV - mean_C1)
