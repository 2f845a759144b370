"""From the config's fields to the loss: one vocabulary or two."""

from typing import Any

from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.hidden_states import HiddenLoss
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.making import Student
from ray_jobs.distillation.retokenize import retokenizer_between
from ray_jobs.distillation.targets import Targets
from ray_jobs.distillation.uld import UldLoss


def choose_loss(
    section: dict[str, Any], targets: Targets, hidden: HiddenLoss | None, *, student: Student, teacher: str, max_length: int
) -> DistillLoss | UldLoss:
    """Return the loss of a distillation.

    Args:
        section: fields of [distill].
        teacher: name of the model whose tokenizer made the rows.
        max_length: positions of the student.
    """
    weights = {"kd_weight": section["kd_weight"], "ce_weight": section["ce_weight"]}
    if section["vocabulary"] == "uld":
        between = retokenizer_between(teacher, student.tokenizer, max_length=max_length)
        return UldLoss(targets, between, kd_temperature=section["kd_temperature"], **weights)
    divergence = Divergence(section["divergence"], beta=section["beta"], skew=section["skew"], temperature=section["kd_temperature"])
    options = {"hidden": hidden, "balanced": section["balance"] == "magnitude", "num_tokens": student.num_tokens}
    return DistillLoss(targets, divergence=divergence, **options, **weights)
