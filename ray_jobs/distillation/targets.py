"""What the teacher has to say about a batch, and who says it.

Shapes: N valid positions, M those that one of several teachers speaks of, H width, V vocabulary, K kept entries.
"""

import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ray_jobs.distillation.hidden_states import valid_states
from ray_jobs.distillation.topk import TopKTarget
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import causal_lm


class HiddenTarget(NamedTuple):
    """Final hidden states and the head, which together are all of the teacher's logits."""

    hidden_NH: Tensor
    head_VH: Tensor
    """Output embedding: hidden states times its transpose are the logits."""
    layers_NH: tuple[Tensor, ...] = ()
    """Outputs of single layers, from a teacher in the same worker that was asked for them."""


OneTarget = HiddenTarget | TopKTarget


class Part(NamedTuple):
    """What one of several teachers says, and where: M of the N valid positions."""

    target: OneTarget
    places_M: Tensor
    """Which of the valid positions, rising."""
    shares_M: Tensor
    """Its part in the divergence of each; those of all teachers of a position add up to 1."""


class SeveralTarget(NamedTuple):
    """What several teachers say."""

    parts: dict[str, Part | None]
    """By name, of all teachers; None where one says nothing."""


Target = OneTarget | SeveralTarget


class Targets(Protocol):
    """Gives the teacher's word on micro-batches; one object on each worker."""

    @property
    def ahead(self) -> int:
        """Steps whose micro-batches it wants to know before it is asked for them."""

    @property
    def waited_s(self) -> float:
        """Seconds in which `of` waited for what comes from elsewhere, since the start."""

    def head(self) -> Tensor:
        """Return the teacher's output embedding, on the student's device."""

    def announce(self, batches: list[Batch]) -> None:
        """Take micro-batches that `of` will be asked for soon, in this order, so that they can be got ready."""

    def of(self, batch: Batch) -> Target:
        """Return the target at the batch's valid positions, in the order of `valid_hidden`, on the batch's device."""

    def probe(self, batch: Batch) -> HiddenTarget | None:
        """Return final hidden states of a batch that is not trained on, neither kept nor counted; None where no teacher is loaded."""

    def flush(self) -> None:
        """Make safe what is kept for later runs: a checkpoint is about to be written."""

    def release(self) -> None:
        """Free what can be loaded again: nothing has been asked for a long time."""

    def counts(self) -> dict[str, float]:
        """Return what was done on this worker since it began, by name."""

    def facts(self) -> dict[str, float]:
        """Return what the manifest says of the targets, by name; called once, at the end."""


class WorkerTeacher:
    """A frozen teacher in the same process as the student.

    Args:
        model: a causal language model on the student's device.
        layers: whose outputs the target holds beside the final hidden states.
    """

    ahead = 0
    waited_s = 0.0

    def __init__(self, model: PreTrainedModel, *, layers: Sequence[int] = ()):
        self.model, self._layers = model.eval().requires_grad_(False), layers

    def head(self) -> Tensor:
        """Return the teacher's output embedding."""
        return causal_lm(self.model).get_output_embeddings().weight

    def announce(self, batches: list[Batch]) -> None:
        """Do nothing: the teacher is here."""

    @torch.no_grad()
    def of(self, batch: Batch) -> HiddenTarget:
        """Return the target at the batch's valid positions."""
        hidden_NH, _, layers_NH = valid_states(self.model, batch, self._layers)
        return HiddenTarget(hidden_NH, self.head(), layers_NH)

    def probe(self, batch: Batch) -> HiddenTarget:
        """Return the target of a batch that is not trained on."""
        return self.of(batch)

    def flush(self) -> None:
        """Do nothing: nothing is kept."""

    def release(self) -> None:
        """Do nothing: whoever gave the model decides."""

    def counts(self) -> dict[str, float]:
        """Return nothing: each batch is computed."""
        return {}

    def facts(self) -> dict[str, float]:
        """Return nothing: nothing is kept."""
        return {}


class LazyTeacher:
    """A teacher in the same process whose body is loaded when it is first asked, and freed when it is no longer needed.

    Args:
        load: returns the model on the student's device.
        load_head: returns its output embedding alone.
    """

    ahead = 0
    waited_s = 0.0

    def __init__(self, load: Callable[[], PreTrainedModel], load_head: Callable[[], Tensor]):
        self._load, self._load_head = load, load_head
        self._teacher: WorkerTeacher | None = None
        self._head_VH: Tensor | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the body is in memory."""
        return self._teacher is not None

    def head(self) -> Tensor:
        """Return the teacher's output embedding."""
        if self._head_VH is None:
            self._head_VH = self._teacher.head() if self._teacher else self._load_head()
        return self._head_VH

    def announce(self, batches: list[Batch]) -> None:
        """Do nothing: the teacher is here."""

    def of(self, batch: Batch) -> HiddenTarget:
        """Return the target at the batch's valid positions."""
        if self._teacher is None:
            self._teacher = WorkerTeacher(self._load())
            self._head_VH = None  # one of the two is enough
        return self._teacher.of(batch)

    def probe(self, batch: Batch) -> HiddenTarget | None:
        """Return the target of a batch that is not trained on; None where the body is not in memory."""
        return self._teacher.of(batch) if self._teacher is not None else None

    def flush(self) -> None:
        """Do nothing: nothing is kept."""

    def release(self) -> None:
        """Free the body."""
        if self._teacher is not None:
            self._head_VH, self._teacher = self.head(), None
            gc.collect()
            if self._head_VH.device.type == "cuda":
                torch.cuda.empty_cache()

    def counts(self) -> dict[str, float]:
        """Return nothing: each batch is computed."""
        return {}

    def facts(self) -> dict[str, float]:
        """Return nothing: nothing is kept."""
        return {}
