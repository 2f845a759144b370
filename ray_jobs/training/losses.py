"""What a loss gives the training loop, and the cross-entropy on the labels.

Shapes: B rows, T positions, N valid positions (whose label is not -100), H width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from ray_jobs.training.batches import IGNORE, Batch

CHUNK_POSITIONS = 1024


class LossSums(NamedTuple):
    """Sums over valid positions in nats; the loop divides by the valid positions of the global batch."""

    total: Tensor
    """What is minimised: a scalar with a graph."""
    terms: dict[str, Tensor]
    """Its parts, each a detached scalar, logged apart."""


Loss = Callable[[nn.Module, Batch], LossSums]
"""Called with the model and a micro-batch."""


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the causal language model inside an adapter wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def valid_hidden(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the last hidden states that predict a label, and the labels.

    The attention mask follows from the position ids: transformers keeps examples apart where they restart.

    Returns:
        hidden_NH and labels_N.
    """
    body = causal_lm(model).get_decoder()
    hidden_BTH = body(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).last_hidden_state
    labels_BT = batch.labels_BT[:, 1:]
    valid_BT = labels_BT != IGNORE
    return hidden_BTH[:, :-1][valid_BT], labels_BT[valid_BT]


def cross_entropy_loss(model: nn.Module, batch: Batch) -> LossSums:
    """Return the summed cross-entropy of the labels; only valid positions are projected to the vocabulary."""
    hidden_NH, labels_N = valid_hidden(model, batch)
    head = causal_lm(model).get_output_embeddings()
    total = hidden_NH.sum() * 0.0  # keeps the graph whole for a batch without valid positions
    for hidden_CH, labels_C in zip(hidden_NH.split(CHUNK_POSITIONS), labels_N.split(CHUNK_POSITIONS), strict=True):
        total = total + F.cross_entropy(head(hidden_CH).float(), labels_C, reduction="sum")
    return LossSums(total, {"cross_entropy": total.detach()})
