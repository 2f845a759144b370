"""The texts of a micro-batch of packed rows: where each begins, which tokens it has, and which of its positions count.

A row holds one text after another; position ids restart at each, which keeps the texts apart in attention. Positions
with a label count: masked tokens, or one position of each text. Padding, and rows that count nothing, have no label.
Shapes: B rows, T positions, S texts that count, K their tokens, N positions with a label, H width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ray_jobs.training.batches import IGNORE, Batch


class Texts(NamedTuple):
    """Indices into the flattened positions (B * T) of a micro-batch."""

    first_S: Tensor
    """Each text's first token, which classifiers read."""
    token_K: Tensor
    """The texts' tokens, special ones included."""
    owner_K: Tensor
    """The text of each token, from 0 to S - 1."""
    valid_N: Tensor
    """The positions that have a label."""
    labels_N: Tensor
    num_tokens_S: Tensor
    num_valid_S: Tensor

    def token_shares(self) -> Tensor:
        """Return the weight of each token in a mean over tokens that counts a text as often as it has labels: K numbers, together N."""
        return (self.num_valid_S / self.num_tokens_S)[self.owner_K]


def texts_of(batch: Batch) -> Texts:
    """Return the texts of a micro-batch that have a label, in order."""
    labels = batch.labels_BT.clone()
    labels[:, 0] = IGNORE  # as Batch.num_valid counts
    labels, owner = labels.flatten(), text_numbers(batch.position_ids_BT).flatten()
    is_valid = labels != IGNORE
    num_texts = int(owner[-1]) + 1
    num_valid = torch.bincount(owner[is_valid], minlength=num_texts)
    kept = num_valid > 0
    number = torch.cumsum(kept, 0) - 1
    (token_K,) = torch.nonzero(kept[owner], as_tuple=True)
    (valid_N,) = torch.nonzero(is_valid, as_tuple=True)
    (first,) = torch.nonzero(batch.position_ids_BT.flatten() == 0, as_tuple=True)
    num_tokens = torch.bincount(owner, minlength=num_texts)
    return Texts(first[kept], token_K, number[owner[token_K]], valid_N, labels[valid_N], num_tokens[kept], num_valid[kept])


def text_numbers(position_ids_BT: Tensor) -> Tensor:
    """Return the number of the text that each position belongs to, counted over the micro-batch: shape B, T."""
    return (torch.cumsum((position_ids_BT == 0).flatten(), 0) - 1).view_as(position_ids_BT)


def block_mask(position_ids_BT: Tensor) -> Tensor:
    """Return which positions see which: those of the same text. Shape B, 1, T, T."""
    numbers_BT = text_numbers(position_ids_BT)
    return (numbers_BT[:, :, None] == numbers_BT[:, None, :])[:, None]


def mean_pool(hidden_BTH: Tensor, texts: Texts) -> Tensor:
    """Return the mean of each text's hidden states over its tokens, in float32 or wider: shape S, H.

    Source:
        Reimers and Gurevych 2019, arXiv:1908.10084, section 3.
    """
    wide = torch.promote_types(hidden_BTH.dtype, torch.float32)
    hidden_KH = hidden_BTH.flatten(0, 1)[texts.token_K].to(wide)
    sums_SH = hidden_KH.new_zeros(len(texts.first_S), hidden_KH.shape[1]).index_add(0, texts.owner_K, hidden_KH)
    return sums_SH / texts.num_tokens_S[:, None]
