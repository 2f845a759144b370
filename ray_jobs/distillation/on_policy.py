"""On-policy distillation: on a share of the steps the student writes the answers that the teacher then scores.

Source:
    Agarwal et al. 2023, arXiv:2306.13649 (GKD), algorithm 1.
"""

import math
import time
from typing import Any

import torch
from torch import nn

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.by_source import TeachersBySource
from ray_jobs.distillation.cache import CachedTargets
from ray_jobs.distillation.loss import DistillLoss, term_of
from ray_jobs.distillation.own_answers import Writing, rewrite
from ray_jobs.distillation.targets import Targets
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums


class OnPolicyLoss(DistillLoss):
    """The loss of distillation, on a share of the steps at answers of the student's own.

    Whole steps are its own or the text's, evenly spread: so the choice depends on neither workers nor micro-batches, and no
    worker waits for another that writes. On its own answers the student learns by the divergence, and by hidden states
    where they are compared; cross-entropy on what it said itself would only confirm it. A cache is passed by, as
    these rows never come again. Evaluations are on the text.

    Args:
        targets: the teacher's word on each batch.
        share: of the steps, from 0 to 1.
        writing: how the answers are written.
        options: of `DistillLoss`.
    """

    def __init__(self, targets: Targets, *, share: float, writing: Writing, **options: Any):
        super().__init__(targets, **options)
        self._share, self._writing = share, writing._replace(num_tokens=self.num_tokens)
        unkept = targets.unkept() if isinstance(targets, CachedTargets | TeachersBySource) else targets
        self._scoring = DistillLoss(unkept, **options | {"ce_weight": 0.0})
        self._scoring.balance = self.balance
        self._is_own = False
        self._tokens, self._seconds = 0, 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> LossSums:
        """Return the sums over the batch's valid positions."""
        if self._is_own and torch.is_grad_enabled():
            return self._scoring(model, batch)
        return super().__call__(model, batch)

    def draws(self, step: int) -> bool:
        """Return whether a step, from 0, is trained on the student's own answers."""
        done, after = (math.floor(count * self._share + 1e-9) for count in (step, step + 1))  # 10 * 0.3 is not quite 3
        return after > done

    def draw(self, model: nn.Module, batches: list[Batch], *, step: int, seed: int) -> list[Batch]:
        """Return the step's micro-batches: as they are, or with answers that the model writes, of which the teacher is told."""
        self._is_own = self.draws(step)
        if not self._is_own:
            return batches
        began, was_training = time.perf_counter(), model.training
        model.eval()
        try:
            drawn, counts = zip(*(rewrite(model, batch, self._writing, key=(seed, step)) for batch in batches), strict=True)
        finally:
            model.train(was_training)
        self._tokens += sum(counts)
        self._seconds += time.perf_counter() - began
        self._scoring.targets.announce(list(drawn))
        return list(drawn)

    def after_step(self, terms: dict[str, float]) -> None:
        """Take the terms' means of a step; the cross-entropy of its own words says nothing of the text's, whose factor stays."""
        if self.balance and self._is_own:
            factor = self.balance.factor("ce")
            terms = {**terms, "ce": terms[term_of(self.divergence)] / factor if factor else 0.0}
        super().after_step(terms)

    def counts(self) -> dict[str, float]:
        """Return what was done on this worker since it began, with the tokens it wrote and the time that took."""
        return {**super().counts(), "on_policy_tokens": self._tokens, "generate_s": self._seconds}


def check_on_policy(section: dict[str, Any], *, cuts_parameters: bool) -> None:
    """Refuse answers of the student's own where it cannot write them or learns nothing by them.

    Args:
        section: the fields of [distill].
        cuts_parameters: whether the strategy keeps a part of each parameter on each worker.

    Raises:
        ConfigError: parameters in pieces, or no divergence.
    """
    share = section["on_policy"]["share"]
    if share and cuts_parameters:
        raise ConfigError(
            f"distill.on_policy.share = {share:g}: a student whose parameters are cut in pieces cannot write answers while it trains: use "
            'workers.strategy = "ddp", or "deepspeed" with zero_stage 1 or 2, or set it to 0'
        )
    if share and not section["kd_weight"]:
        raise ConfigError(
            f"distill.on_policy.share = {share:g} with kd_weight = 0: the student's own answers are scored by the divergence, which then "
            "weighs nothing: set kd_weight above 0, or share to 0"
        )
