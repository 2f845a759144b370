"""What the teacher has to say about a batch: final hidden states and its head, which together are all its logits.

Shapes: N valid positions, H width, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import valid_hidden


class WorkerTeacher:
    """A frozen teacher in the same process as the student.

    Args:
        model: a causal language model on the student's device.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)
        self.head_VH: Tensor = model.get_output_embeddings().weight
        """Output embedding: hidden states times its transpose are the logits."""

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Return the final hidden states at the batch's valid positions, shape NH, in the order of the student's."""
        return valid_hidden(self.model, batch)[0]
