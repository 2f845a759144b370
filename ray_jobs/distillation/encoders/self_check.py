"""Before the first step: an encoder's packed loss against each text alone through the model's own forward, and one split against two.

Shapes: B rows, T positions, N positions with a label, H width, V vocabulary, C classes.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ray_jobs.distillation.dense import dense_divergence
from ray_jobs.distillation.encoders.heads import class_logits, token_head, token_states
from ray_jobs.distillation.encoders.loss import States
from ray_jobs.distillation.encoders.student import PROJECTION
from ray_jobs.distillation.self_check import POSITIONS, compare, gradients
from ray_jobs.training.batches import IGNORE, Row, collate
from ray_jobs.training.strategies.base import autocast

if TYPE_CHECKING:
    from ray_jobs.distillation.encoders.loss import EncoderLoss


def check_encoder_loss(loss: "EncoderLoss", model: nn.Module, rows: list[Row], dtype: torch.dtype) -> None:
    """Refuse to train with a loss whose value or gradient is not the sum over its texts, or that changes when a batch is split.

    The reference gives each text alone to the student's own forward, with its own positions, mask and head, and sums
    the terms from all logits. The teacher's states are taken one position late in both, so that a student which
    equals its teacher has a gradient to compare, too.

    Args:
        loss: of the job.
        model: the student, whole; left as it was.
        rows: the first ones of the first step; two are used.
        dtype: of matrix products.

    Raises:
        TrainingFailed: they differ by more than rounding; the message has the numbers.
    """
    pieces = [piece for piece in map(_window, rows[:2]) if piece is not None]
    if not pieces:
        return
    was_training = model.training
    model.eval()
    try:
        with autocast(next(model.parameters()).device, dtype):
            taught = [_stand_in(loss, piece) for piece in pieces]
            whole = _packed(loss, model, pieces, taught)
            parts = [_packed(loss, model, [piece], [states]) for piece, states in zip(pieces, taught, strict=True)]
            alone = _alone(loss, model, pieces, taught)
    finally:
        model.train(was_training)
    compare(whole, alone, dtype, what="the loss of packed rows and that of their texts alone")
    compare([sum(each) for each in zip(*parts, strict=True)], whole, dtype, what="two splits and one")


def _window(row: Row) -> Row | None:
    """Return the whole texts of a row from the first with a label on: one, and as many more as fit in POSITIONS."""
    spans = [(start, end) for start, end in _spans(row) if (row.labels[start + 1 : end] != IGNORE).any()]
    if not spans:
        return None
    first = spans[0][0]
    last = max([spans[0][1], *(end for _, end in spans if end - first <= POSITIONS)])
    window = row.cut(slice(first, last))
    # as micro-batches count: none at the first place
    return window._replace(labels=np.where(np.arange(last - first) == 0, IGNORE, window.labels))


def _spans(row: Row) -> list[tuple[int, int]]:
    """Return where each text of a row begins and ends."""
    starts = np.flatnonzero(row.position_ids == 0).tolist()
    return list(zip(starts, [*starts[1:], len(row.input_ids)], strict=True))


def _stand_in(loss: "EncoderLoss", piece: Row) -> States:
    states = loss.states_of_teacher(collate([piece]).to(_device(loss.teacher)))
    return States(states.model, [states_BTH.roll(1, 1) for states_BTH in states.every])


def _packed(loss: "EncoderLoss", model: nn.Module, pieces: list[Row], taught: list[States]) -> list[Tensor]:
    batch = collate(pieces).to(_device(model))
    layers = zip(*(states.every for states in taught), strict=True)
    teacher = States(loss.teacher, [pad_sequence([states_BTH[0] for states_BTH in layer], batch_first=True) for layer in layers])
    total = loss.against(teacher, model, batch).total
    return [total.detach(), *gradients(total, model)]


def _alone(loss: "EncoderLoss", model: nn.Module, pieces: list[Row], taught: list[States]) -> list[Tensor]:
    total = torch.zeros((), device=_device(model))
    for piece, states in zip(pieces, taught, strict=True):
        for start, end in _spans(piece):
            labels_T = torch.tensor(piece.labels[start:end], dtype=torch.long, device=total.device)
            if (labels_T != IGNORE).any():
                ids_BT = torch.tensor(piece.input_ids[start:end], dtype=torch.long, device=total.device)[None]
                total = total + _text_loss(loss, model, ids_BT, labels_T, [states_BTH[0, start:end] for states_BTH in states.every])
    return [total.detach(), *gradients(total, model)]


def _text_loss(loss: "EncoderLoss", model: Any, ids_BT: Tensor, labels_T: Tensor, taught: list[Tensor]) -> Tensor:
    """Return the weighted terms of one text; `taught` has the teacher's states of shape T, H."""
    found = model(input_ids=ids_BT, output_hidden_states=True)
    mine = [states_BTH[0].float() for states_BTH in found.hidden_states]
    labels_N = labels_T[labels_T != IGNORE]
    total = mine[-1].new_zeros(())
    if loss.task == "masked_language_model":
        theirs_NV = token_states(loss.teacher, taught[-1][labels_T != IGNORE]) @ token_head(loss.teacher).T
        total = total + _between(loss, found.logits[0][labels_T != IGNORE], theirs_NV, labels_N)
    elif loss.task == "classification":
        total = total + _between(loss, found.logits, class_logits(loss.teacher, taught[-1][:1]), labels_N)
    elif mine[-1].shape == taught[-1].shape:
        pooled = [states_TH.float().mean(0) for states_TH in (mine[-1], taught[-1])]
        total = total + loss.weights.embedding * len(labels_N) * (1 - F.cosine_similarity(*pooled, dim=0))
    projection = getattr(model, PROJECTION, nn.Identity())
    for one, other in loss.pairs if loss.weights.hidden else ():
        mine_TH, theirs_TH = projection(mine[one + 1]).float(), taught[other + 1].float()
        apart_T = 1 - F.cosine_similarity(mine_TH, theirs_TH) if loss.hidden_loss == "cosine" else (mine_TH - theirs_TH).square().mean(-1)
        total = total + loss.weights.hidden * len(labels_N) * apart_T.mean() / len(loss.pairs)
    return total


def _between(loss: "EncoderLoss", mine_NV: Tensor, theirs_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the weighted terms of token or class distributions; a label below 0 is none."""
    num_both = min(mine_NV.shape[-1], theirs_NV.shape[-1])
    mine_NV, theirs_NV = (logits_NV[:, :num_both].float() for logits_NV in (mine_NV, theirs_NV))
    divergence = dense_divergence(mine_NV, theirs_NV.detach(), loss.trained).sum()
    ce = F.cross_entropy(mine_NV, labels_N, ignore_index=-1, reduction="sum")
    return loss.weights.kd * divergence + loss.weights.ce * ce


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
