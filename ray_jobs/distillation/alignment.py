"""Whether a teacher's targets are of the positions they are used at, asked of the real teacher before anything is trained on it.

Two rows that are equal but for one token must have equal targets before that token and others at it: an order that is
turned, a shift by one, or rows that see each other are found whatever the model says, in a pool as in the worker.

Shapes: R rows, T positions, N valid positions, H width.
"""

import torch

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.distillation.targets import HiddenTarget, Targets
from ray_jobs.training.batches import Batch

LENGTH = 8
"""Tokens of each of the two rows, at most."""
DIFFERENT = 0.05
"""Relative gap from which targets differ; rounding in 16 bits stays below a fifth of it."""


def check_alignment(targets: Targets, batch: Batch, *, whose: str = "the teacher") -> bool:
    """Ask the teacher for two short rows and refuse targets at wrong positions; False where nothing could be asked yet.

    Args:
        batch: whose first tokens are taken.
        whose: the targets are, for the message.

    Raises:
        TrainingFailed: the targets differ from another position on than the rows do; the message has the numbers.
    """
    probe = _two_rows(batch)
    target = None if probe is None else targets.probe(probe)
    if probe is None or target is None:
        return False
    changed = probe.input_ids_BT.shape[1] // 2
    gaps_N = _gaps(target, probe.input_ids_BT.shape[1] - 1)
    first = next((place for place, gap in enumerate(gaps_N) if not gap <= DIFFERENT), None)
    if first != changed:
        seen = "do not differ" if first is None else f"differ from position {first} on"
        raise TrainingFailed(
            f"self-check of {whose}: of two rows that differ from position {changed} on the targets {seen} (relative gaps "
            f"{', '.join(f'{gap:.2g}' for gap in gaps_N)}; {DIFFERENT:g} is the limit): they are of other positions than those they are "
            "used at. Training would go wrong in silence, so it does not start: report this with your versions of torch and transformers"
        )
    return True


def _two_rows(batch: Batch) -> Batch | None:
    """Return a row's first tokens twice, with another token in the middle of the second; None where the batch is too short or uniform."""
    ids_T = batch.input_ids_BT[0, :LENGTH]
    place = len(ids_T) // 2
    others = batch.input_ids_BT[batch.input_ids_BT != ids_T[place]] if place else ids_T[:0]
    if place < 2 or not len(others):
        return None
    changed_T = ids_T.clone()
    changed_T[place] = others[0]
    ids_RT, length = torch.stack([ids_T, changed_T]), len(ids_T)
    positions_RT = torch.arange(length, device=ids_T.device).expand(2, -1)
    sources_RT = None if batch.sources_BT is None else batch.sources_BT[:1, :1].expand(2, length)
    return Batch(ids_RT, positions_RT, ids_RT, sources_RT)


def _gaps(target: HiddenTarget, length: int) -> list[float]:
    """Return how far the two rows' hidden states are apart at each position, relative to their size."""
    one_NH, other_NH = target.hidden_NH.float().split(length)
    return ((one_NH - other_NH).norm(dim=-1) / one_NH.norm(dim=-1).clamp_min(1e-12)).tolist()
