"""Before the first step: the fast loss against the dense one, and one split against two, on rows that will be trained on.

Shapes: T positions.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.distillation.by_source import TeachersBySource
from ray_jobs.distillation.cache import CachedTargets
from ray_jobs.distillation.stand_in import Form, dense_loss, stand_in
from ray_jobs.training.batches import IGNORE, Row, collate
from ray_jobs.training.strategies.base import autocast

POSITIONS = 64
"""Of each row; two rows are taken."""
NUMBERS = 64_000_000
"""Gradients are compared for the smallest trained tensors with at most so many numbers together."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest relative difference, by the type of the products; in 16 bits each sum is rounded where its order ends."""


def check_loss(loss: Any, model: nn.Module, rows: list[Row], dtype: torch.dtype) -> None:
    """Refuse to train with a loss whose value or gradient is not that of the dense form, or that changes when a batch is split.

    All terms are compared, on a stand-in for the teacher: the student's own states, each one position late, so that no
    teacher is asked; where a cache keeps top-k targets, on those of the stand-in too; of several
    teachers, on as many. The dense form starts from the
    logits and hidden states of the model's own forward. Terms are not balanced here.

    Args:
        loss: a `DistillLoss`.
        model: the student, whole; left as it was.
        rows: the first ones of the first step; two are used.
        dtype: of matrix products.

    Raises:
        TrainingFailed: they differ by more than TOLERANCE; the message has the numbers.
    """
    plain = copy.copy(loss)
    plain.balance = None
    pieces = [window for window in map(_window, rows[:2]) if (window.labels[1:] != IGNORE).any()]
    if not pieces:
        return
    was_training = model.training
    model.eval()
    try:
        with autocast(next(model.parameters()).device, dtype):
            for form in _forms(loss.targets):
                _check(plain, model, pieces, dtype, form)
    finally:
        model.train(was_training)


def _forms(targets: Any) -> list[Form]:
    """Return what is compared: hidden states of one teacher or of several, and top-k targets where they are kept."""
    if isinstance(targets, TeachersBySource):
        hidden: dict[str, int | None] = dict.fromkeys(targets.top_k)
        return [hidden, targets.top_k] if any(targets.top_k.values()) else [hidden]
    kept = targets.top_k if isinstance(targets, CachedTargets) else None
    return [None, kept] if kept else [None]


def _words(form: Form) -> str:
    if form is None or isinstance(form, int):
        return "" if form is None else f" on top-{form} targets"
    kept = sorted({top_k for top_k in form.values() if top_k})
    return f" of {len(form)} teachers" + "".join(f" on top-{top_k} targets" for top_k in kept)


def _check(loss: Any, model: nn.Module, pieces: list[Row], dtype: torch.dtype, form: Form) -> None:
    words = _words(form)
    total = dense_loss(loss, model, pieces, form=form)
    dense = [total.detach(), *gradients(total, model)]
    whole = _fast(loss, model, pieces, form)
    parts = [_fast(loss, model, [piece], form) for piece in pieces]
    compare(whole, dense, dtype, what=f"the fused loss and the dense reference{words}")
    compare([sum(each) for each in zip(*parts, strict=True)], whole, dtype, what=f"two splits and one{words}")


def _window(row: Row) -> Row:
    """Return the part of a row from a little before its first label."""
    labelled = np.flatnonzero(row.labels != IGNORE)
    start = max(0, int(labelled[0]) - 8) if len(labelled) else 0
    return row.cut(slice(start, start + POSITIONS))


def _fast(loss: Any, model: nn.Module, pieces: list[Row], form: Form) -> list[Tensor]:
    batch = collate(pieces).to(next(model.parameters()).device)
    total = loss.against(stand_in(loss, model, pieces, form=form), model, batch).total
    return [total.detach(), *gradients(total, model)]


def gradients(total: Tensor, model: nn.Module) -> list[Tensor]:
    """Return the gradients of the smallest trained tensors, with at most NUMBERS numbers together."""
    trained = sorted((each for each in model.parameters() if each.requires_grad), key=lambda each: each.numel())
    sizes = np.cumsum([each.numel() for each in trained])
    chosen = trained[: max(1, int((sizes <= NUMBERS).sum()))]
    found = torch.autograd.grad(total, chosen, allow_unused=True)
    return [torch.zeros_like(each) if grad is None else grad for each, grad in zip(chosen, found, strict=True)]


def compare(seen: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, *, what: str) -> None:
    """Refuse a loss that is not what it should be.

    Args:
        seen: its value, then its gradients.
        wanted: the reference's.
        dtype: of matrix products.
        what: both, for the message.

    Raises:
        TrainingFailed: they differ by more than TOLERANCE.
    """
    limit = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    value, reference = float(seen[0]), float(wanted[0])
    gap = sum(float((a - b).double().square().sum()) for a, b in zip(seen[1:], wanted[1:], strict=True)) ** 0.5
    norm = sum(float(b.double().square().sum()) for b in wanted[1:]) ** 0.5
    if not (abs(value - reference) <= limit * max(abs(reference), 1.0) and gap <= limit * max(norm, 1e-3)):
        raise TrainingFailed(
            f"self-check of the loss: {what} differ on the first rows: loss {value:.6g} against {reference:.6g}, gradients apart by "
            f"{gap:.3g} at a norm of {norm:.3g}; at most {limit:g} of either is rounding in {dtype}. Training would go wrong in "
            "silence, so it does not start: report this with your versions of torch and transformers"
        )
