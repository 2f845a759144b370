"""Block influence: how much each of the teacher's layers changes the hidden states of the training text.

Shapes: B rows, T positions, N valid positions, H width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.training.batches import IGNORE, PackedRows, collate, step_rows
from ray_jobs.training.losses import decoder_layers, valid_hidden

NUM_ROWS = 32
"""Training rows that are measured, at most: the order of the layers is settled long before (docs/distillation.md)."""


@torch.no_grad()
def measure_influence(
    model: nn.Module, rows: PackedRows, *, seed: int, num_rows: int = NUM_ROWS, micro_batch_size: int = 2
) -> dict[str, Any]:
    """Return the block influence of each layer, as `influence`, with `rows` and `positions` it was measured on.

    The influence of a layer is 1 minus the mean cosine between its input and its output at the valid positions:
    0 for a layer that changes nothing. The outputs are taken before the final norm. The same rows, model and seed
    give the same numbers.

    Args:
        model: a causal language model in eval mode.
        rows: training rows; the first `num_rows` of the first epoch's order are taken.
        seed: of the order.

    Source:
        Men et al. 2024, arXiv:2403.03853, equation 1.
    """
    chosen = sorted(step_rows(len(rows), step=0, seed=seed, global_batch_size=min(num_rows, len(rows))))
    device = next(model.parameters()).device
    layers = decoder_layers(model)
    cosines = torch.zeros(len(layers), dtype=torch.float64)
    num_valid = 0
    for start in range(0, len(chosen), micro_batch_size):
        batch = collate([rows[index] for index in chosen[start : start + micro_batch_size]]).to(device)
        valid_BT = batch.labels_BT[:, 1:] != IGNORE
        with _Watch(layers, valid_BT) as watch:
            valid_hidden(model, batch)
        cosines += torch.tensor(watch.sums, dtype=torch.float64)
        num_valid += batch.num_valid
    influence = (1 - cosines / max(num_valid, 1)).tolist()
    return {"influence": influence, "rows": len(chosen), "positions": num_valid}


def most_influential(influence: list[float], count: int) -> list[int]:
    """Return the indices of the `count` layers with the highest influence, in rising order; of equal ones the earlier.

    No place is kept by rule, as in the paper: a trained model's first and last layers change the states most, so they
    stay because they were measured to matter, and where one does not, keeping it would cost a layer that does.
    """
    return sorted(sorted(range(len(influence)), key=lambda index: (-influence[index], index))[:count])


def influence_table(found: dict[str, Any], kept: list[int]) -> list[str]:
    """Return the measured influences as lines of ten layers; `*` marks a kept one."""
    influence = found["influence"]
    lines = [f"block influence of {len(influence)} layers at {found['positions']} positions of {found['rows']} rows; * is kept"]
    for start in range(0, len(influence), 10):
        cells = [f"{influence[i]:.3f}{'*' if i in kept else ' '}" for i in range(start, min(start + 10, len(influence)))]
        lines.append(f"  {start:>3}  {' '.join(cells)}".rstrip())
    return lines


class _Watch:
    """Sums the cosine between each layer's input and output over valid positions, while it is entered."""

    def __init__(self, layers: nn.ModuleList, valid_BT: Tensor):
        self._layers, self._valid_BT = layers, valid_BT
        self.sums = [0.0] * len(layers)

    def __enter__(self) -> "_Watch":
        self._hooks = [layer.register_forward_hook(self._hook(index), with_kwargs=True) for index, layer in enumerate(self._layers)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
            before_BTH = inputs[0] if inputs else named["hidden_states"]
            after_BTH = output[0] if isinstance(output, tuple) else output
            before_NH, after_NH = (states[:, :-1][self._valid_BT].float() for states in (before_BTH, after_BTH))
            self.sums[index] = float(F.cosine_similarity(before_NH, after_NH, dim=-1).sum(dtype=torch.float64))

        return add
