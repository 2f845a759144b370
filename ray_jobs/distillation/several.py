"""The divergences from several teachers in one pass over the student's logits: each at its own positions, by its share there.

Shapes: N valid positions, M those that one teacher speaks of, C positions of one chunk, B positions of one block of it, H width,
V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ray_jobs.distillation.divergence import (
    Divergence,
    HeadLoss,
    OfTeacher,
    head_loss_against,
    projection_dtype,
    top_k_teacher,
    whole_teacher,
)
from ray_jobs.distillation.fused_head import Chunk, Teacher
from ray_jobs.distillation.targets import OneTarget, Part, SeveralTarget
from ray_jobs.distillation.topk import TopKTarget


def fused_several_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    target: SeveralTarget,
    labels_N: Tensor,
    *,
    divergence: Divergence,
    kd_weight: float,
    ce_weight: float,
    num_tokens: int | None = None,
) -> HeadLoss:
    """Return kd_weight * the divergences by their shares + ce_weight * cross-entropy, summed over positions.

    The student's logits are formed once for all teachers. `each` of the result has what every teacher's divergence
    alone comes to at its positions, whatever its share in them.

    Args:
        student_hidden_NH: final hidden states at valid positions.
        student_head_VH: output embedding of the student.
        target: what the teachers say; they may differ in width, and some in form.
        labels_N: the token that follows each position.
        divergence: which one, and its temperature.
        kd_weight: weight of the divergences together.
        ce_weight: weight of the cross-entropy.
        num_tokens: tokens of the vocabulary; rows of a head beyond are padding. None takes the rows that all heads have.
    """
    spoken = {name: part for name, part in target.parts.items() if part is not None}
    heads = [part.target.head_VH for part in spoken.values() if not isinstance(part.target, TopKTarget)]
    num_tokens = num_tokens or min(map(len, [student_head_VH, *heads]))
    dtype = projection_dtype(student_head_VH)
    teachers = _Teachers({name: (_teacher(part.target, divergence, num_tokens, dtype), _Places.of(part)) for name, part in spoken.items()})
    loss = head_loss_against(teachers, student_hidden_NH, student_head_VH, labels_N, divergence, kd_weight, ce_weight, num_tokens)
    nothing = OfTeacher(torch.zeros_like(loss.divergence), 0)
    each = {
        name: nothing if part is None else OfTeacher(teachers.sums[name] * divergence.scale, len(part.places_M))
        for name, part in target.parts.items()
    }
    return loss._replace(each=each)


class _Places(NamedTuple):
    """Where a teacher speaks: on the host, so that chunks are found without waiting for a device."""

    places_M: np.ndarray
    shares_M: np.ndarray

    @classmethod
    def of(cls, part: Part) -> "_Places":
        return cls(part.places_M.cpu().numpy(), part.shares_M.cpu().numpy())

    def within(self, at: slice) -> slice:
        """Return which of its positions are among some of the batch's, or of the chunk's."""
        low, high = np.searchsorted(self.places_M, (at.start, at.stop))
        return slice(int(low), int(high))

    def cut(self, inside: slice, start: int) -> "_Places":
        """Return some of its positions, counted from `start`."""
        return _Places(self.places_M[inside] - start, self.shares_M[inside])


def _teacher(target: OneTarget, divergence: Divergence, num_tokens: int, dtype: torch.dtype) -> Teacher:
    if isinstance(target, TopKTarget):
        return top_k_teacher(*target.at(divergence.temperature), divergence, num_tokens=num_tokens)
    return whole_teacher(target.hidden_NH, target.head_VH, divergence, num_tokens=num_tokens, dtype=dtype)


class _Teachers:
    """All teachers as one; remembers what each came to."""

    def __init__(self, teachers: dict[str, tuple[Teacher, _Places]]):
        self._teachers = teachers
        self.sums: dict[str, Tensor] = {}

    def chunk(self, at: slice) -> "_Chunk":
        """Return their word on some positions."""
        found = {}
        for name, (teacher, places) in self._teachers.items():
            inside = places.within(at)
            if inside.stop > inside.start:
                found[name] = teacher.chunk(inside), places.cut(inside, at.start)
        return _Chunk(found, self.sums)


class _Chunk:
    """The teachers' word on the positions of one chunk."""

    def __init__(self, chunks: dict[str, tuple[Chunk, _Places]], sums: dict[str, Tensor]):
        self._chunks, self._sums = chunks, sums

    def compare_(self, log_q_BV: Tensor, rows: slice) -> Tensor:
        """Return the divergences of each row by their shares; overwrites the student's log-probabilities with their gradient."""
        divergence_B, grad_BV = log_q_BV.new_zeros(len(log_q_BV)), torch.zeros_like(log_q_BV)
        for name, (chunk, places) in self._chunks.items():
            inside = places.within(rows)
            if inside.stop == inside.start:
                continue
            mine = places.cut(inside, rows.start)
            at_M, shares_M = (torch.from_numpy(values).to(log_q_BV.device) for values in mine)
            shares_M = shares_M.to(log_q_BV.dtype)
            softened_MV = log_q_BV[at_M]  # a copy, which its gradient overwrites
            found_M = chunk.compare_(softened_MV, inside).clamp_(min=0)
            self._sums[name] = self._sums.get(name, 0.0) + found_M.sum()
            divergence_B.index_add_(0, at_M, shares_M * found_M)
            grad_BV.index_add_(0, at_M, softened_MV.mul_(shares_M.unsqueeze(-1)))
        log_q_BV.copy_(grad_BV)
        return divergence_B
