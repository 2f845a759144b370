"""Who plays the teacher's part in the self-check, and the loss against it once more from the model's own logits, densely.

Shapes: N valid positions, H width of the student, W of what stands in, V vocabulary, K kept tokens,
M positions that one of several teachers speaks of.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.distillation.dense import dense_divergence, dense_top_k_divergence
from ray_jobs.distillation.hidden_states import PROJECTION, valid_states
from ray_jobs.distillation.targets import HiddenTarget, OneTarget, Part, SeveralTarget, Target
from ray_jobs.distillation.topk import TopKTarget, make_top_k
from ray_jobs.training.batches import IGNORE, Row, collate
from ray_jobs.training.losses import causal_lm, decoder_layers

Form = int | Mapping[str, int | None] | None
"""What a teacher gives: so many kept tokens of a distribution, or hidden states (None); of several teachers, each one's by name."""


@torch.no_grad()
def stand_in(loss: Any, model: nn.Module, pieces: list[Row], *, form: Form) -> Target:
    """Return the student's own states, each some positions after its own, as the word of teachers; as wide as the teacher's.

    Of several teachers each is later than the one before, has a weight of its own, and is silent at some positions.

    Args:
        loss: a `DistillLoss`, whose layers are compared.
    """
    if not isinstance(form, Mapping):
        return _one(loss, model, pieces, top_k=form, late_by=1)
    ranks_N = torch.cat([torch.arange(int((piece.labels[1:] != IGNORE).sum())) for piece in pieces])
    weights_K = torch.arange(1.0, len(form) + 1)
    speaks_NK = (ranks_N[:, None] + torch.arange(len(form))) % (len(form) + 1) > 0
    shares_NK = speaks_NK * weights_K / (speaks_NK * weights_K).sum(-1, keepdim=True)
    parts: dict[str, Part | None] = {}
    for number, (name, top_k) in enumerate(form.items()):
        target, places_M = _one(loss, model, pieces, top_k=top_k, late_by=number + 1), speaks_NK[:, number].nonzero()[:, 0]
        device = next(model.parameters()).device
        parts[name] = Part(_at(target, places_M.to(device)), places_M.to(device), shares_NK[places_M, number].to(device))
    return SeveralTarget(parts)


def _at(target: OneTarget, places_M: Tensor) -> OneTarget:
    if isinstance(target, TopKTarget):
        return TopKTarget(*(each[places_M] for each in target))
    return HiddenTarget(target.hidden_NH[places_M], target.head_VH)


def _one(loss: Any, model: nn.Module, pieces: list[Row], *, top_k: int | None, late_by: int) -> OneTarget:
    device, projection = next(model.parameters()).device, getattr(model, PROJECTION, None)
    layers = loss.hidden.student_layers if loss.hidden else ()
    head_VH = causal_lm(model).get_output_embeddings().weight
    head_VW = head_VH if projection is None else projection(head_VH)
    found = []
    for piece in pieces:
        hidden_NH, _, layers_NH = valid_states(model, collate([piece]).to(device), layers)
        late = [each.roll(late_by, 0) for each in (hidden_NH, *layers_NH)]
        found.append(late if projection is None else [projection(each) for each in late])
    hidden_NW, *layers_NW = (torch.cat(each) for each in zip(*found, strict=True))
    if top_k is None:
        return HiddenTarget(hidden_NW, head_VW, tuple(layers_NW))
    labels_N = torch.cat([torch.as_tensor(labels[labels != IGNORE]) for labels in (piece.labels[1:] for piece in pieces)])
    return make_top_k(hidden_NW, head_VW[: loss.num_tokens], labels_N.to(device), k=top_k)


def dense_loss(loss: Any, model: nn.Module, pieces: list[Row], *, form: Form) -> Tensor:
    """Return the sum of the loss against the stand-in: from all logits and all hidden states of the model's forward, row by row."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for piece in pieces:
        batch = collate([piece]).to(total.device)
        valid_BT = batch.labels_BT[:, 1:] != IGNORE
        with _last_output(model) as last:
            inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
            out = model(**inputs, output_hidden_states=loss.hidden is not None)
        student_NV = out.logits[:, :-1][valid_BT][:, : loss.num_tokens].float()
        target = stand_in(loss, model, [piece], form=form)
        total = total + loss.kd_weight * _between(student_NV, target, loss).sum()
        total = total + loss.ce_weight * F.cross_entropy(student_NV, batch.labels_BT[:, 1:][valid_BT], reduction="sum")
        if loss.hidden:
            # a model gives the outputs of all layers but the last one, after which it gives the norm's
            states = [*out.hidden_states[1:-1], last[0]]
            mine = [states[index] for index in loss.hidden.student_layers] or [out.hidden_states[-1]]
            theirs = target.layers_NH or (target.hidden_NH,)
            mine_NH = [each[:, :-1][valid_BT] for each in mine]
            total = total + loss.hidden.weight * _distance(model, mine_NH, theirs, loss.hidden.kind)
    return total


def _between(student_NV: Tensor, target: Target, loss: Any) -> Tensor:
    if isinstance(target, SeveralTarget):
        total_N = student_NV.new_zeros(len(student_NV))
        for part in filter(None, target.parts.values()):
            total_N = total_N.index_add(0, part.places_M, part.shares_M * _between(student_NV[part.places_M], part.target, loss))
        return total_N
    if isinstance(target, TopKTarget):
        return dense_top_k_divergence(student_NV, *target.at(loss.divergence.temperature), loss.divergence)
    teacher_NV = (target.hidden_NH @ target.head_VH.T)[:, : loss.num_tokens]
    return dense_divergence(student_NV, teacher_NV, loss.divergence)


def _distance(model: nn.Module, mine_NH: list[Tensor], theirs_NW: tuple[Tensor, ...], kind: str) -> Tensor:
    projection, total = getattr(model, PROJECTION, None), 0.0
    for mine, theirs in zip(mine_NH, theirs_NW, strict=True):
        a, b = (mine if projection is None else mine @ projection.weight.T).float(), theirs.float()
        if kind == "cosine":
            total = total + (1 - (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()).sum()
        else:
            total = total + ((a - b) ** 2).sum() / a.shape[-1]
    return total / len(mine_NH)


@contextlib.contextmanager
def _last_output(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the output of the last decoder layer once the model has run."""
    found: list[Tensor] = []
    hook = decoder_layers(model)[-1].register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
    try:
        yield found
    finally:
        hook.remove()
