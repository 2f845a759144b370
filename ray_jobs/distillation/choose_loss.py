"""From the config's fields to the loss: one vocabulary or two, on the text or on answers of the student's own too."""

from typing import Any

from ray_jobs.core.models import resolve_model
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.hidden_states import HiddenLoss
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.making import Student
from ray_jobs.distillation.on_policy import OnPolicyLoss
from ray_jobs.distillation.own_answers import Writing
from ray_jobs.distillation.retokenize import retokenizer_between
from ray_jobs.distillation.targets import Targets
from ray_jobs.distillation.uld import UldLoss
from ray_jobs.training.models import load_tokenizer


def choose_loss(
    section: dict[str, Any],
    targets: Targets,
    hidden: HiddenLoss | None,
    *,
    student: Student,
    teacher: str,
    max_length: int,
    row_tokens: int,
) -> DistillLoss | UldLoss:
    """Return the loss of a distillation.

    Args:
        section: fields of [distill].
        teacher: name of the model whose tokenizer made the rows.
        max_length: positions of the student.
        row_tokens: tokens that a packed row may have.
    """
    weights = {"kd_weight": section["kd_weight"], "ce_weight": section["ce_weight"]}
    if section["vocabulary"] == "uld":
        between = retokenizer_between(teacher, student.tokenizer, max_length=max_length)
        return UldLoss(targets, between, kd_temperature=section["kd_temperature"], **weights)
    divergence = Divergence(section["divergence"], beta=section["beta"], skew=section["skew"], temperature=section["kd_temperature"])
    options = {"hidden": hidden, "balanced": section["balance"] == "magnitude", "num_tokens": student.num_tokens}
    own = section["on_policy"]
    if not own["share"]:
        return DistillLoss(targets, divergence=divergence, **options, **weights)
    end = load_tokenizer(resolve_model(student.tokenizer)).eos_token_id
    writing = Writing(own["max_new_tokens"], own["sampling_temperature"], row_tokens, () if end is None else (end,))
    return OnPolicyLoss(targets, share=own["share"], writing=writing, divergence=divergence, **options, **weights)
