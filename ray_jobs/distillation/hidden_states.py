"""The loss on hidden states: how far the student's layers are from the teacher's, through a projection where widths differ.

Shapes: B rows, T positions, N valid positions, H width.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.distillation.layers import pair_layers
from ray_jobs.training.batches import IGNORE, Batch
from ray_jobs.training.losses import decoder_layers, valid_hidden

PROJECTION = "hidden_projection"
"""Name of the module that a student carries while it trains: so optimizer, workers and checkpoints see it as the student's own."""


class HiddenLoss(NamedTuple):
    """How hidden states are compared, and the weight of that term.

    Source:
        Sanh et al. 2019, arXiv:1910.01108, section 2 (cosine).
    """

    weight: float
    kind: Literal["cosine", "mse"] = "cosine"
    """1 - cosine, or the mean squared error over the width."""
    student_layers: tuple[int, ...] = ()
    """Whose outputs meet those in the target's `layers_NH`; empty compares the final hidden states."""

    def __call__(self, student: nn.Module, mine_NH: Sequence[Tensor], theirs_NH: Sequence[Tensor]) -> Tensor:
        """Return the distance, meaned over layers and summed over positions, in float32 or wider.

        Args:
            student: projects its states where it carries a projection.
            mine_NH: of the student, one for each layer.
            theirs_NH: of the teacher.
        """
        projection = getattr(student, PROJECTION, None)
        total = 0.0
        for mine, theirs in zip(mine_NH, theirs_NH, strict=True):
            projected = mine if projection is None else projection(mine)
            total = total + _distance(projected, theirs, self.kind).sum()
        return total / len(mine_NH)


def valid_states(model: nn.Module, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return what `valid_hidden` returns, and the outputs of some decoder layers at the same positions.

    Returns:
        hidden_NH, labels_N, and one tensor (N, H) for each of `layers`.
    """
    outputs: dict[int, Tensor] = {}
    valid_BT = batch.labels_BT[:, 1:] != IGNORE

    def keep(index: int, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[index] = (output[0] if isinstance(output, tuple) else output)[:, :-1][valid_BT]

    blocks = decoder_layers(model) if layers else []
    hooks = [blocks[index].register_forward_hook(lambda _, __, output, index=index: keep(index, output)) for index in set(layers)]
    try:
        hidden_NH, labels_N = valid_hidden(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden_NH, labels_N, tuple(outputs[index] for index in layers)


def add_projection(student: nn.Module, teacher_width: int, *, seed: int) -> None:
    """Give a student a trainable map to the teacher's width, where its own differs: equal on all workers.

    Source:
        Romero et al. 2014, arXiv:1412.6550, section 2 (a regressor on the student's side).
    """
    width = student.config.hidden_size
    if width == teacher_width:
        return
    first = next(student.parameters())
    projection = nn.Linear(width, teacher_width, bias=False, dtype=torch.float32)
    nn.init.normal_(projection.weight, std=width**-0.5, generator=torch.Generator().manual_seed(seed))
    student.add_module(PROJECTION, projection.to(first.device))


def prepare_hidden(
    student: nn.Module, teacher: nn.Module, section: dict[str, Any], *, kept: Sequence[int] | None, seed: int
) -> tuple[HiddenLoss | None, list[int]]:
    """Return the loss on hidden states, and the teacher's layers that it needs; gives the student a projection where widths differ.

    Args:
        section: the fields of [distill].
        kept: the teacher's layers that the student was cut from; none for a model of its own.
        seed: of the projection.

    Raises:
        ConfigError: layers that a model does not have.
    """
    if not section["hidden_weight"]:
        return None, []
    numbers = {"num_student_layers": student.config.num_hidden_layers, "num_teacher_layers": teacher.config.num_hidden_layers}
    pairs = pair_layers(section["hidden_layers"], kept=kept, **numbers)
    add_projection(student, teacher.config.hidden_size, seed=seed)
    loss = HiddenLoss(section["hidden_weight"], section["hidden_loss"], tuple(mine for mine, _ in pairs))
    return loss, [theirs for _, theirs in pairs]


def drop_projection(student: nn.Module) -> None:
    """Take the projection off a trained student: it is no part of the model that is exported."""
    if hasattr(student, PROJECTION):
        delattr(student, PROJECTION)


def _distance(mine_NH: Tensor, theirs_NH: Tensor, kind: str) -> Tensor:
    wide = torch.promote_types(mine_NH.dtype, torch.float32)
    mine_NH, theirs_NH = mine_NH.to(wide), theirs_NH.detach().to(wide)
    if kind == "cosine":
        return 1 - F.cosine_similarity(mine_NH, theirs_NH, dim=-1)
    return (mine_NH - theirs_NH).square().mean(-1)
