"""Block influence of an encoder's layers on the texts it is to teach.

Shapes: B rows, T positions, K tokens of the texts that count, H width.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ray_jobs.distillation.encoders.load import hidden_states
from ray_jobs.distillation.encoders.texts import texts_of
from ray_jobs.distillation.influence import NUM_ROWS
from ray_jobs.training.batches import PackedRows, collate, step_rows


@torch.no_grad()
def measure_encoder_influence(
    model: PreTrainedModel, rows: PackedRows, *, seed: int, num_rows: int = NUM_ROWS, micro_batch_size: int = 2
) -> dict[str, Any]:
    """Return the block influence of each layer as `measure_influence` does, over all tokens of the texts that count.

    A text is read in both directions and learned from as a whole, so each of its tokens weighs the same, special ones
    included. The texts are as people wrote them: nothing is masked.

    Args:
        model: an encoder as `load_encoder` returns it.
        rows: training rows; the first `num_rows` of the first epoch's order are taken.
        seed: of the order.

    Source:
        Men et al. 2024, arXiv:2403.03853, equation 1.
    """
    chosen = sorted(step_rows(len(rows), step=0, seed=seed, global_batch_size=min(num_rows, len(rows))))
    device = next(model.parameters()).device
    cosines = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    num_tokens = 0
    for start in range(0, len(chosen), micro_batch_size):
        batch = collate([rows[index] for index in chosen[start : start + micro_batch_size]]).to(device)
        token_K = texts_of(batch).token_K
        states = [states_BTH.flatten(0, 1)[token_K].float() for states_BTH in hidden_states(model, batch, every_layer=True)]
        sums = [F.cosine_similarity(*pair, dim=-1).sum(dtype=torch.float64) for pair in itertools.pairwise(states)]
        cosines += torch.stack(sums).cpu()
        num_tokens += len(token_K)
    return {"influence": (1 - cosines / max(num_tokens, 1)).tolist(), "rows": len(chosen), "positions": num_tokens}
