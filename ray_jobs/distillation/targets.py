"""What the teacher has to say about a batch, and who says it.

Shapes: N valid positions, H width, V vocabulary, K kept entries.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import valid_hidden


class HiddenTarget(NamedTuple):
    """Final hidden states and the head, which together are all of the teacher's logits."""

    hidden_NH: Tensor
    head_VH: Tensor
    """Output embedding: hidden states times its transpose are the logits."""


class Targets(Protocol):
    """Gives the teacher's word on micro-batches; one object on each worker."""

    waited_s: float
    """Seconds in which `of` waited for a teacher elsewhere, since the start."""

    def announce(self, batches: list[Batch]) -> None:
        """Take micro-batches that `of` will be asked for soon, in this order, so that they can be got ready."""

    def of(self, batch: Batch) -> HiddenTarget:
        """Return the target at the batch's valid positions, in the order of `valid_hidden`, on the batch's device."""


class WorkerTeacher:
    """A frozen teacher in the same process as the student.

    Args:
        model: a causal language model on the student's device.
    """

    waited_s = 0.0

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)
        self.head_VH: Tensor = model.get_output_embeddings().weight

    def announce(self, batches: list[Batch]) -> None:
        """Do nothing: the teacher is here."""

    @torch.no_grad()
    def of(self, batch: Batch) -> HiddenTarget:
        """Return the target at the batch's valid positions."""
        return HiddenTarget(valid_hidden(self.model, batch)[0], self.head_VH)
