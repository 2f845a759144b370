"""A teacher's distributions in few bytes: its likeliest tokens, and what all others weigh together at any temperature.

Shapes: N valid positions, C positions of a chunk, H width, V vocabulary, K kept entries, G nodes of the tail.

The others' weight at temperature T is the exponential of f(b) = log sum p^b, b = 1 / T: smooth and convex in b. It is kept
with its slope at a few b, and cubic between them, so that one kept target serves a sweep of temperatures.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ray_jobs.core.errors import ConfigError

CHUNK_POSITIONS = 256
"""Positions projected to the vocabulary at once: the only logits alive."""
TAIL_NODES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""1 / T at which the tail is kept: temperatures 4, 2, 4/3, 1, 2/3 and 1/2 are exact."""
COLDEST = 1 / TAIL_NODES[-1]
"""Lowest temperature that the tail is kept for."""
_STEPS = 2**16 - 1


class TopKTarget(NamedTuple):
    """The teacher's likeliest tokens at each position with their log-probabilities, and all others as one bucket."""

    token_ids_NK: Tensor
    """Likeliest first; int64."""
    log_p_NK: Tensor
    """At temperature 1; float32, as the rest."""
    tail_NG: Tensor
    """Log of the sum of p^b over the tokens that are not kept, at TAIL_NODES."""
    slope_NG: Tensor
    """Its derivative in b there."""
    label_log_p_N: Tensor
    """Log-probability of the token that follows: the teacher's own cross-entropy with its sign turned."""

    def at(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return token_ids_NK, log_p_NK and log_tail_N of the teacher softened by a temperature.

        The K entries and the tail are one distribution over K + 1 buckets: their probabilities add up to 1.

        Raises:
            ConfigError: the temperature is below COLDEST.
        """
        check_temperature(temperature)
        scaled_NK = self.log_p_NK / temperature
        tail_N = self._tail(1 / temperature)
        total_N = torch.logaddexp(scaled_NK.logsumexp(-1), tail_N)
        return self.token_ids_NK, scaled_NK - total_N[:, None], tail_N - total_N

    def to(self, device: torch.device | str) -> "TopKTarget":
        """Return the target on a device."""
        return TopKTarget(*(tensor.to(device) for tensor in self))

    def _tail(self, b: float) -> Tensor:
        right = next(index for index, node in enumerate(TAIL_NODES) if node >= b)
        left, width = right - 1, TAIL_NODES[right] - TAIL_NODES[right - 1]
        s = (b - TAIL_NODES[left]) / width
        values = (1 + 2 * s) * (1 - s) ** 2 * self.tail_NG[:, left] + s * s * (3 - 2 * s) * self.tail_NG[:, right]
        return values + width * s * (1 - s) * ((1 - s) * self.slope_NG[:, left] - s * self.slope_NG[:, right])


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that a kept tail does not reach.

    Raises:
        ConfigError: it is below COLDEST.
    """
    if temperature < COLDEST:
        raise ConfigError(
            f'distill.kd_temperature = {temperature:g} is below {COLDEST:g}, the lowest of targets kept with cache.keep = "top_k": '
            'raise it, or use cache.keep = "hidden"'
        )


@torch.no_grad()
def make_top_k(hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, *, k: int) -> TopKTarget:
    """Return the k likeliest tokens and the tail of the distributions that final hidden states and a head make.

    Args:
        labels_N: the token that follows each position.
        k: V - 1 at most are kept.
    """
    k = min(k, len(head_VH) - 1)
    parts = [
        _chunk((hidden_CH.to(head_VH.dtype) @ head_VH.T).float(), labels_C, k)
        for hidden_CH, labels_C in zip(hidden_NH.split(CHUNK_POSITIONS), labels_N.split(CHUNK_POSITIONS), strict=True)
    ]
    return TopKTarget(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _chunk(logits_CV: Tensor, labels_C: Tensor, k: int) -> tuple[Tensor, ...]:
    log_p_CV = logits_CV.log_softmax(-1)
    label_C = log_p_CV.gather(1, labels_C[:, None])[:, 0]
    kept_CK, ids_CK = log_p_CV.topk(k)
    return ids_CK, kept_CK, *_tail_of(log_p_CV.scatter_(1, ids_CK, -math.inf)), label_C


def _tail_of(others_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tail and its slope at TAIL_NODES; what is no part of the tail is -inf."""
    top_C1 = others_CV.amax(-1, keepdim=True)
    kept_CV = others_CV.isinf()
    quarter_CV = ((others_CV - top_C1) / 4).exp_()  # the nodes are multiples of a quarter: one exp, the rest products
    others_CV = others_CV.masked_fill_(kept_CV, 0.0)
    powers = {0: (~kept_CV).float(), 1: quarter_CV, 2: quarter_CV**2}
    powers[3], powers[4] = powers[1] * powers[2], powers[2] ** 2
    values, slopes = [], []
    for node in TAIL_NODES:
        weight_CV = powers.get(round(4 * node))
        if weight_CV is None:
            weight_CV = powers[round(2 * node)] ** 2
        sum_C = weight_CV.sum(-1)
        values.append(sum_C.log() + node * top_C1[:, 0])
        slopes.append((weight_CV * others_CV).sum(-1) / sum_C)
    return torch.stack(values, 1), torch.stack(slopes, 1)


class TopKCodec(NamedTuple):
    """Targets as bytes: ids in 2 or 4 each, log-probabilities in 2 between the exact first and last of their position."""

    k: int
    vocabulary: int

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position."""
        return sum(width * np.dtype(kind).itemsize for kind, width in self._columns())

    def encode(self, target: TopKTarget) -> bytes:
        """Return a target on a CPU as bytes."""
        first_N, last_N = target.log_p_NK[:, 0], target.log_p_NK[:, -1]
        steps_NK = (target.log_p_NK - last_N[:, None]) / _step(first_N, last_N)
        exact = torch.cat([torch.stack([first_N, last_N, target.label_log_p_N], dim=1), target.tail_NG], dim=1)
        tensors = (exact, target.slope_NG, steps_NK.round().clamp(0, _STEPS), target.token_ids_NK)
        kinds = [kind for kind, _ in self._columns()]
        return b"".join(tensor.numpy().astype(kind).tobytes() for tensor, kind in zip(tensors, kinds, strict=True))

    def decode(self, data: bytes) -> TopKTarget:
        """Return what `encode` made bytes of."""
        num_positions, offset, found = len(data) // self.bytes_per_position, 0, []
        for kind, width in self._columns():
            values = np.frombuffer(data, kind, num_positions * width, offset).reshape(num_positions, width)
            offset += values.nbytes
            found.append(torch.from_numpy(values.astype(np.float32 if np.issubdtype(kind, np.floating) else np.int64)))
        exact, slope_NG, steps_NK, ids_NK = found
        first_N, last_N, label_N = exact[:, :3].unbind(1)
        return TopKTarget(ids_NK, last_N[:, None] + steps_NK * _step(first_N, last_N), exact[:, 3:], slope_NG, label_N)

    def _columns(self) -> tuple[tuple[type, int], ...]:
        k, num_nodes = min(self.k, self.vocabulary - 1), len(TAIL_NODES)
        ids = np.uint16 if self.vocabulary <= 2**16 else np.uint32
        return (np.float32, 3 + num_nodes), (np.float16, num_nodes), (np.uint16, k), (ids, k)


def _step(first_N: Tensor, last_N: Tensor) -> Tensor:
    return ((first_N - last_N) / _STEPS).clamp_min(1e-30)[:, None]
