"""Held-out quality of any runtime, from its own logits: loss on the labels, and distance to the reference model.

Shapes: T positions, N labelled positions, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ray_jobs.compression.runtimes import Runtime


class Segment(NamedTuple):
    """One example on its own: what it says, and which of its tokens count."""

    input_ids: list[int]
    labels: list[int]
    """Same length; -100 where a token does not count."""


class Quality(NamedTuple):
    """Means over the labelled tokens."""

    num_tokens: int
    loss_nats: float
    """Cross-entropy of the labels."""
    kl_nats: float | None
    """KL(reference || model) of the next-token distributions; None without a reference."""
    agreement: float | None
    """Share of positions where both find the same token most likely; None without a reference."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss_nats)


def split_rows(rows: Iterable[Mapping[str, Any]]) -> list[Segment]:
    """Return the examples of packed rows one by one; those without a label are left out.

    Args:
        rows: with `input_ids`, `labels` and `segment_lengths`.
    """
    segments = []
    for row in rows:
        start = 0
        for length in row["segment_lengths"]:
            segment = Segment(row["input_ids"][start : start + length], row["labels"][start : start + length])
            segments += [segment] if any(label >= 0 for label in segment.labels[1:]) else []
            start += length
    return segments


def log_probabilities(runtime: Runtime, segment: Segment) -> torch.Tensor:
    """Return log-probabilities at the positions that predict a label, float32 [N, V]."""
    logits_TV = torch.from_numpy(runtime.logits(segment.input_ids))
    counted_T = torch.tensor(segment.labels[1:]) >= 0
    return logits_TV[:-1][counted_T].log_softmax(dim=-1)


def score(log_probs: Iterable[torch.Tensor], segments: list[Segment], references: list[torch.Tensor] | None) -> Quality:
    """Return a model's quality over held-out segments.

    Args:
        log_probs: log_probabilities of the model, one tensor a segment; taken one by one.
        references: log_probabilities of the reference model, one tensor a segment; None leaves the distance out.
    """
    loss = kl = agreeing = 0.0
    num_tokens = 0
    for index, (segment, log_probs_NV) in enumerate(zip(segments, log_probs, strict=True)):
        labels_N = torch.tensor([label for label in segment.labels[1:] if label >= 0])
        loss -= log_probs_NV.gather(1, labels_N[:, None]).sum().item()
        num_tokens += len(labels_N)
        if references:
            reference_NV = references[index]
            kl += (reference_NV.exp() * (reference_NV - log_probs_NV)).sum().item()
            agreeing += (log_probs_NV.argmax(-1) == reference_NV.argmax(-1)).sum().item()
    if not references:
        return Quality(num_tokens, loss / num_tokens, None, None)
    kl_nats = max(0.0, kl / num_tokens)  # rounding takes the sum of equal distributions to just below 0
    return Quality(num_tokens, loss / num_tokens, kl_nats, agreeing / num_tokens)
