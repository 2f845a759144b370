"""Kinds of kept targets: what a cache makes of the teacher's word, what that costs, and how far it is from the exact word.

Shapes: N valid positions, C positions of one chunk, H width, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_jobs.core.storage import Storage
from ray_jobs.distillation.cache import CachedTargets, Kept, KeptHidden, KeptTopK
from ray_jobs.distillation.dense import dense_divergence
from ray_jobs.distillation.divergence import CHUNK_POSITIONS, Divergence
from ray_jobs.distillation.fused_head import Teacher, TopKTeacher, WholeTeacher
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.targets import HiddenTarget, Target, WorkerTeacher
from ray_jobs.distillation.topk import TopKCodec
from ray_jobs.training.batches import Batch


class Answered(WorkerTeacher):
    """A teacher whose targets are there already: what a cache takes on top of its forward pass."""

    def __init__(self, model: Any, targets: Iterable[HiddenTarget]):
        super().__init__(model)
        self._coming: Iterator[HiddenTarget] = iter(targets)

    def of(self, batch: Batch) -> HiddenTarget:
        """Return the next one."""
        del batch
        return next(self._coming)


class Turn(NamedTuple):
    """One pass over all batches with a cache that is empty before it."""

    seconds: dict[str, float]
    """CPU and wall time of writing and of reading: write_cpu_s, write_wall_s, read_cpu_s, read_wall_s."""
    num_bytes: int
    """Of the cache's files."""
    targets: list[Target]
    """As they were read."""


def kept_as(kind: str, settings: Any) -> Kept:
    """Return what a cache keeps.

    Args:
        kind: hidden-TYPE or top-K.
        settings: the teacher's config.
    """
    what, _, value = kind.partition("-")
    if what == "top":
        return KeptTopK(TopKCodec(int(value), settings.vocab_size))
    return KeptHidden(settings.hidden_size, getattr(torch, value))


def turn(kind: str, teacher: Any, batches: list[Batch], exact: list[HiddenTarget], folder: Path) -> Turn:
    """Write all targets into an empty folder with the job's own cache, and read them with another one.

    Args:
        exact: the teacher's targets of the batches.
    """

    def cache() -> CachedTargets:
        store = ShardStore(Storage(str(folder)), kind=kind, budget_bytes=2**40)
        kept = kept_as(kind, teacher.config)
        return CachedTargets(Answered(teacher, exact), store, identity="teacher", kept=kept, epoch_rows=len(batches))

    began = _clocks()
    writing = cache()
    for batch in batches:
        writing.of(batch)
    writing.flush()
    written = _clocks()
    reading = cache()
    targets = [reading.of(batch) for batch in batches]
    read = _clocks()
    if reading.counts()["targets_computed"]:
        raise RuntimeError(f"{kind}: {reading.counts()['targets_computed']:.0f} of {len(batches)} targets were not read back from {folder}")
    names = [f"{what}_{clock}_s" for what in ("write", "read") for clock in ("cpu", "wall")]
    spans = [after - before for first, last in ((began, written), (written, read)) for before, after in zip(first, last, strict=True)]
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return Turn(dict(zip(names, spans, strict=True)), num_bytes, targets)


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


class Word(NamedTuple):
    """What a target says to a student: its scaled divergence at each position, and the gradient at the student's hidden states."""

    divergence_N: Tensor
    gradient_NH: Tensor


def exact_word(student_NH: Tensor, head_VH: Tensor, target: HiddenTarget, divergence: Divergence) -> Word:
    """Return the dense form by autograd on all logits of a chunk, in float32."""
    return _in_chunks(_exact_chunk, student_NH, head_VH, target, divergence)


def kept_word(student_NH: Tensor, head_VH: Tensor, target: Target, divergence: Divergence) -> Word:
    """Return what the fused head trains on: its own chunks of the target."""
    return _in_chunks(_kept_chunk, student_NH, head_VH, target, divergence)


def _in_chunks(word: Callable[..., Word], student_NH: Tensor, head_VH: Tensor, target: Target, divergence: Divergence) -> Word:
    starts = range(0, len(student_NH), CHUNK_POSITIONS)
    parts = [word(student_NH, head_VH, target, divergence, slice(start, start + CHUNK_POSITIONS)) for start in starts]
    return Word(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _exact_chunk(student_NH: Tensor, head_VH: Tensor, target: HiddenTarget, divergence: Divergence, at: slice) -> Word:
    leaf_CH = student_NH[at].detach().requires_grad_(True)
    divergence_C = dense_divergence(leaf_CH @ head_VH.T, target.hidden_NH[at] @ target.head_VH.T, divergence)
    (gradient_CH,) = torch.autograd.grad(divergence_C.sum(), leaf_CH)
    return Word(divergence_C.detach(), gradient_CH)


def _kept_chunk(student_NH: Tensor, head_VH: Tensor, target: Target, divergence: Divergence, at: slice) -> Word:
    log_q_CV = torch.log_softmax(student_NH[at] @ head_VH.T / divergence.temperature, dim=-1)
    whole = slice(0, len(log_q_CV))
    divergence_C = _teacher(target, divergence).chunk(at).compare_(log_q_CV, whole)  # leaves the gradient by the softened logits
    return Word(divergence.scale * divergence_C, divergence.scale / divergence.temperature * (log_q_CV @ head_VH))


def _teacher(target: Target, divergence: Divergence) -> Teacher:
    if isinstance(target, HiddenTarget):
        return WholeTeacher(target.hidden_NH, target.head_VH, divergence.compare_, divergence.temperature)
    return TopKTeacher(*target.at(divergence.temperature), divergence.compare_)


def errors(kept: list[Word], exact: list[Word]) -> dict[str, float]:
    """Return how far the words of a kind are from the exact ones, each a mean over positions.

    Returns:
        exact_nats: the exact divergence; error_nats: the mean absolute error of a position's; relative: error_nats over
        exact_nats; bias_nats: the mean error with its sign; norm_ratio: a position's gradient norm over the exact one;
        cosine_gap: 1 - cosine of both gradients; gradient_error: norm of the difference of all gradients over that of the exact ones.
    """
    mine_N, true_N = (torch.cat([word.divergence_N for word in words]).double() for words in (kept, exact))
    mine_NH, true_NH = (torch.cat([word.gradient_NH for word in words]).double() for words in (kept, exact))
    norms_N, true_norms_N = mine_NH.norm(dim=1), true_NH.norm(dim=1)
    cosines_N = torch.linalg.vecdot(mine_NH, true_NH) / (norms_N * true_norms_N)
    error_N = mine_N - true_N
    return {
        "exact_nats": float(true_N.mean()),
        "error_nats": float(error_N.abs().mean()),
        "relative": float(error_N.abs().mean() / true_N.mean()),
        "bias_nats": float(error_N.mean()),
        "norm_ratio": float((norms_N / true_norms_N).mean()),
        "cosine_gap": float((1 - cosines_N).mean()),
        "gradient_error": float((mine_NH - true_NH).norm() / true_NH.norm()),
    }
