"""The loss of an encoder's distillation, as the training loop calls it.

Shapes: B rows, T positions, N positions with a label, S texts, K their tokens, H width, V vocabulary, C classes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ray_jobs.distillation.dense import dense_divergence
from ray_jobs.distillation.divergence import CHUNK_POSITIONS, Divergence, fused_head_loss
from ray_jobs.distillation.encoders.heads import class_logits, token_head, token_states
from ray_jobs.distillation.encoders.load import hidden_states
from ray_jobs.distillation.encoders.student import PROJECTION
from ray_jobs.distillation.encoders.texts import Texts, mean_pool, texts_of
from ray_jobs.distillation.loss import term_of
from ray_jobs.training.batches import Batch, Row
from ray_jobs.training.losses import LossSums


class Weights(NamedTuple):
    """Of the terms of the loss; those that a task does not have stay unused."""

    kd: float = 0.0
    """Divergence of the token or class distributions."""
    ce: float = 0.0
    """Cross-entropy on masked tokens or classes."""
    hidden: float = 0.0
    embedding: float = 0.0


class EncoderLoss:
    """The weighted sum of a task's terms over the positions that count, each term logged apart.

    masked_language_model: divergence and `ce` of the masked tokens. classification: divergence and `ce` of the classes of each text
    (texts without a label count nothing in `ce`). embedding: `embedding`, 1 - cosine of the mean-pooled outputs, which is
    half the squared distance of the unit vectors. All: `hidden`, the mean over layers and over a text's tokens, counted as
    often as the text has labels; so that every term is a sum over the same positions, however they are split.
    Without gradients (in evaluation) the divergence is `kl` at temperature 1, as in DistillLoss, with `ce_teacher` beside it.

    Args:
        teacher: an encoder on the student's device; is frozen.
        task: masked_language_model, embedding or classification.
        divergence: which one is trained, and its temperature; none is forward KL at 1.
        hidden_loss: cosine (1 - cosine) or mse (mean over the width).
        pairs: layers whose outputs meet, as (student, teacher) from 0.

    Source:
        Sanh et al. 2019, arXiv:1910.01108 (KL, masked tokens and cosine); Reimers and Gurevych 2020, arXiv:2004.09813
        (embeddings of a student drawn to its teacher's).
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        *,
        task: str,
        weights: Weights,
        divergence: Divergence | None = None,
        hidden_loss: str = "cosine",
        pairs: list[tuple[int, int]] | None = None,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self._terms = {"masked_language_model": self._tokens, "embedding": self._embeddings, "classification": self._classes}[task]
        self.task, self.weights, self.trained = task, weights, divergence or Divergence()
        self.hidden_loss, self.pairs = hidden_loss, pairs or []
        self._teacher_head: Tensor | None = token_head(teacher) if task == "masked_language_model" else None

    def __call__(self, model: Any, batch: Batch) -> LossSums:
        """Return the sums over the positions with a label."""
        return self.against(self.states_of_teacher(batch), model, batch)

    def check(self, model: torch.nn.Module, rows: list[Row], dtype: torch.dtype) -> None:
        """Compare value and gradient with those of each text alone, as `check_encoder_loss` does."""
        from ray_jobs.distillation.encoders.self_check import check_encoder_loss  # it reads this loss

        check_encoder_loss(self, model, rows, dtype)

    @torch.no_grad()
    def states_of_teacher(self, batch: Batch) -> "States":
        """Return what the teacher says of a micro-batch."""
        return self.states(self.teacher, batch)

    def states(self, model: Any, batch: Batch) -> "States":
        """Return an encoder's hidden states of a micro-batch: of every layer where they are compared."""
        return States(model, hidden_states(model, batch, every_layer=bool(self.weights.hidden)))

    def against(self, teacher: "States", model: Any, batch: Batch) -> LossSums:
        """Return the sums for what a teacher said of the micro-batch."""
        return self.between(self.states(model, batch), teacher, texts_of(batch))

    def between(self, student: "States", teacher: "States", texts: Texts) -> LossSums:
        """Return the sums for what both said of the texts of a micro-batch."""
        total, terms = self._terms(student, teacher, texts)
        if self.weights.hidden:
            hidden = self._hidden(student, teacher, texts)
            total, terms = total + self.weights.hidden * hidden, terms | {"hidden": hidden.detach()}
        return LossSums(total, terms)

    @property
    def _divergence(self) -> Divergence:
        return self.trained if torch.is_grad_enabled() else Divergence()

    def _tokens(self, student: "States", teacher: "States", texts: Texts) -> tuple[Tensor, dict[str, Tensor]]:
        mine_NH = token_states(student.model, student.last[texts.valid_N])
        with torch.no_grad():
            theirs_NH = token_states(teacher.model, teacher.last[texts.valid_N])
        loss = fused_head_loss(
            mine_NH,
            token_head(student.model),
            theirs_NH,
            self._teacher_head,
            texts.labels_N,
            divergence=self._divergence,
            kd_weight=self.weights.kd,
            ce_weight=self.weights.ce,
        )
        terms = {term_of(self._divergence): loss.divergence, "ce": loss.ce}
        return loss.total, terms if torch.is_grad_enabled() else terms | {"ce_teacher": _head_ce(theirs_NH, self._teacher_head, texts)}

    def _embeddings(self, student: "States", teacher: "States", texts: Texts) -> tuple[Tensor, dict[str, Tensor]]:
        mine_SH, theirs_SH = (mean_pool(states.every[-1], texts) for states in (student, teacher))
        if mine_SH.shape != theirs_SH.shape:  # another width: hidden states alone are compared
            return mine_SH.new_zeros(()), {}
        loss = ((1 - F.cosine_similarity(mine_SH, theirs_SH)) * texts.num_valid_S).sum()
        return self.weights.embedding * loss, {"embedding": loss.detach()}

    def _classes(self, student: "States", teacher: "States", texts: Texts) -> tuple[Tensor, dict[str, Tensor]]:
        mine_SC, theirs_SC = (class_logits(states.model, states.last[texts.first_S]).float() for states in (student, teacher))
        between = dense_divergence(mine_SC, theirs_SC, self._divergence).sum()
        labels_S = texts.labels_N
        ce, ce_teacher = (F.cross_entropy(logits_SC, labels_S, ignore_index=-1, reduction="sum") for logits_SC in (mine_SC, theirs_SC))
        terms = {term_of(self._divergence): between.detach(), "ce": ce.detach()}
        if not torch.is_grad_enabled():
            agreed = (mine_SC.argmax(-1) == theirs_SC.argmax(-1)).sum().float()
            terms |= {"ce_teacher": ce_teacher, "agreement": agreed}
        return self.weights.kd * between + self.weights.ce * ce, terms

    def _hidden(self, student: "States", teacher: "States", texts: Texts) -> Tensor:
        projection = getattr(student.model, PROJECTION, torch.nn.Identity())
        share_K = texts.token_shares() / len(self.pairs)
        total = student.every[0].new_zeros((), dtype=torch.float32)
        for mine, theirs in self.pairs:
            mine_KH = projection(student.every[mine + 1].flatten(0, 1)[texts.token_K])
            theirs_KH = teacher.every[theirs + 1].flatten(0, 1)[texts.token_K]
            total = total + (_distance(mine_KH, theirs_KH, self.hidden_loss) * share_K).sum()
        return total


class States(NamedTuple):
    """An encoder's hidden states of a micro-batch."""

    model: Any
    """The encoder, for its head."""
    every: list[Tensor]
    """Each of shape B, T, H: the last alone, or the embeddings' and each layer's output."""

    @property
    def last(self) -> Tensor:
        """Those of all B * T positions."""
        return self.every[-1].flatten(0, 1)


def _distance(mine_KH: Tensor, theirs_KH: Tensor, kind: str) -> Tensor:
    wide = torch.promote_types(mine_KH.dtype, torch.float32)
    mine_KH, theirs_KH = mine_KH.to(wide), theirs_KH.to(wide)
    return 1 - F.cosine_similarity(mine_KH, theirs_KH) if kind == "cosine" else (mine_KH - theirs_KH).square().mean(-1)


def _head_ce(states_NH: Tensor, head_VH: Tensor | None, texts: Texts) -> Tensor:
    total = states_NH.new_zeros((), dtype=torch.float32)
    for states_DH, labels_D in zip(states_NH.split(CHUNK_POSITIONS), texts.labels_N.split(CHUNK_POSITIONS), strict=True):
        total += F.cross_entropy((states_DH @ head_VH.T).float(), labels_D, reduction="sum")
    return total
