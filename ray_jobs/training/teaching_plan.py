"""What distillation adds to a worker's memory: the teacher, its forward pass, its scores, and hidden states that are compared.

Shapes: B rows, T positions, N positions of a micro-batch, C positions of one chunk, H width, V vocabulary.
"""

import functools
import json
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ray_jobs.training.activations import forward_bytes, store_quantized
from ray_jobs.training.losses import CHUNK_POSITIONS
from ray_jobs.training.models import Quantization
from ray_jobs.training.skeletons import linear_layers, skeleton_of, weight_bytes

_FLOAT32 = 4
_GPU_ARRAYS = 3
"""Float32 arrays of a chunk that the divergence makes on a GPU; on a CPU it goes on in blocks of a few rows."""


class Teaching(NamedTuple):
    """Who teaches, and what of the teacher is in the worker's memory."""

    settings: dict[str, Any]
    """The teacher's config.json."""
    place: str = "worker"
    """worker: all of it; head: its output embedding alone, with hidden states from elsewhere; none: it spoke beforehand."""
    quantization: Quantization | None = None
    """How it is stored; none keeps it in the computation type."""
    adapter_rank: int = 0
    """Rank of the adapter that a quantized teacher keeps beside its weights; 0 where there is none."""
    hidden_pairs: int = 0
    """Pairs of layers whose outputs are compared."""
    others: tuple[dict[str, Any], ...] = ()
    """config.json of each further teacher: in the same place, stored alike, without an adapter."""

    @property
    def each(self) -> "list[Teaching]":
        """All teachers, one by one."""
        alone = self._replace(others=())
        return [alone, *(alone._replace(settings=settings, adapter_rank=0, hidden_pairs=0) for settings in self.others)]


class Taught(NamedTuple):
    """Bytes that teaching adds."""

    teacher: int
    """Weights, and what their storage needs beside them."""
    forward: int
    """The teacher's forward pass, gone before the loss begins."""
    scores: int
    """Alive in the loss: the teacher's hidden states and its scores of one chunk."""
    kept: int
    """Hidden states that are compared, alive from the forward pass to the end of the loss."""


def teaching_bytes(teaching: Teaching, **sizes: Any) -> Taught:
    """Return what one worker holds for its teachers, who go forward one after the other; sizes are those of `_of_one`."""
    found = [_of_one(each, **sizes) for each in teaching.each]
    forward = max(taught.forward for taught in found)
    return Taught(sum(taught.teacher for taught in found), forward, *(sum(taught[field] for taught in found) for field in (2, 3)))


def _of_one(teaching: Teaching, *, student_width: int, batch_size: int, length: int, dtype: torch.dtype, device: str = "cpu") -> Taught:
    """Return what one worker holds for one teacher.

    Args:
        student_width: H of the student.
        dtype: computation type of both.
    """
    if teaching.place == "none":
        return Taught(0, 0, 0, 0)
    model = _skeleton(json.dumps(teaching.settings))
    config, positions = model.config, batch_size * length
    arrays = dtype.itemsize + (_GPU_ARRAYS * _FLOAT32 if device != "cpu" else 0)
    scores = arrays * min(CHUNK_POSITIONS, positions) * config.vocab_size + positions * config.hidden_size * dtype.itemsize
    # both models' states at the compared positions, in their type and once more in float32
    kept = teaching.hidden_pairs * positions * (student_width + config.hidden_size) * (dtype.itemsize + _FLOAT32)
    if teaching.place == "head":
        return Taught(config.vocab_size * config.hidden_size * dtype.itemsize, 0, scores, kept)
    return Taught(_weights(model, teaching, dtype), _forward(teaching, batch_size, length, dtype), scores, kept)


def _weights(model: PreTrainedModel, teaching: Teaching, dtype: torch.dtype) -> int:
    stored = weight_bytes(model, dtype=dtype, quantization=teaching.quantization)
    adapter = sum(teaching.adapter_rank * sum(layer.weight.shape) for layer in linear_layers(model)) * _FLOAT32
    return stored.weights + stored.constants + adapter


def _forward(teaching: Teaching, batch_size: int, length: int, dtype: torch.dtype) -> int:
    is_quantized = teaching.quantization is not None
    return _forward_bytes(json.dumps(teaching.settings), is_quantized, batch_size, length, dtype)


@functools.lru_cache(maxsize=64)
def _forward_bytes(settings: str, is_quantized: bool, batch_size: int, length: int, dtype: torch.dtype) -> int:
    model = skeleton_of(json.loads(settings), num_layers=2, dtype=dtype)
    if is_quantized:
        store_quantized(linear_layers(model), dtype)
    return forward_bytes(model, batch_size=batch_size, length=length, dtype=dtype)


@functools.lru_cache(maxsize=8)
def _skeleton(settings: str) -> PreTrainedModel:
    return skeleton_of(json.loads(settings))
