"""The targets of several teachers by data source: each is asked for its own examples and no others.

Shapes: B rows, T positions, N valid positions, M those that one teacher speaks of, S sources, K teachers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ray_jobs.distillation.alignment import check_alignment
from ray_jobs.distillation.cache import CachedTargets
from ray_jobs.distillation.targets import HiddenTarget, OneTarget, Part, SeveralTarget, Target, Targets
from ray_jobs.training.batches import IGNORE, Batch, Row, collate


class TeachersBySource:
    """The targets of several teachers, each asked for the examples of its sources and no others.

    Examples of a packed row do not see each other, so those of one teacher are laid into shorter rows of their own.

    Args:
        teachers: the targets of each, by name.
        shares_SK: of each teacher, in the order of `teachers`, in the divergence of each source.
    """

    def __init__(self, teachers: Mapping[str, Targets], shares_SK: Tensor):
        self._teachers, self._shares_SK = dict(teachers), shares_SK
        self._aligned: set[str] = set()

    @property
    def ahead(self) -> int:
        """Steps whose micro-batches one of them wants to know before it is asked for them."""
        return max(targets.ahead for targets in self._teachers.values())

    @property
    def waited_s(self) -> float:
        """Seconds in which `of` waited for what comes from elsewhere, since the start."""
        return sum(targets.waited_s for targets in self._teachers.values())

    @property
    def top_k(self) -> dict[str, int | None]:
        """Tokens that are kept of each teacher's distributions; None where it gives hidden states."""
        return {name: targets.top_k if isinstance(targets, CachedTargets) else None for name, targets in self._teachers.items()}

    def head(self) -> Tensor:
        """Return the first teacher's output embedding."""
        return next(iter(self._teachers.values())).head()

    def unkept(self) -> "TeachersBySource":
        """Return the same teachers for rows that never come again: caches are passed by."""
        unkept = {name: targets.unkept() if isinstance(targets, CachedTargets) else targets for name, targets in self._teachers.items()}
        return TeachersBySource(unkept, self._shares_SK)

    def announce(self, batches: list[Batch]) -> None:
        """Tell each teacher what it will be asked for."""
        for number, targets in enumerate(self._teachers.values()):
            parts = (self._taught(batch, number) for batch in batches)
            targets.announce([part for part in parts if part is not None])

    def of(self, batch: Batch) -> SeveralTarget:
        """Return what the teachers say at the batch's valid positions; each teacher's alignment is checked with its first answer.

        Raises:
            TrainingFailed: the targets of one are of other positions than they should be.
        """
        device, on_host = batch.labels_BT.device, batch.to("cpu")
        parts: dict[str, Part | None] = dict.fromkeys(self._teachers)
        for number, (name, targets) in enumerate(self._teachers.items()):
            asked = self._taught(on_host, number)
            if asked is not None:
                places_M, shares_M = self._places(on_host, number)
                parts[name] = Part(_one(targets.of(asked.to(device))), places_M.to(device), shares_M.to(device))
                if name not in self._aligned and check_alignment(targets, asked.to(device), whose=f"teacher {name}"):
                    self._aligned.add(name)
        return SeveralTarget(parts)

    def probe(self, batch: Batch) -> HiddenTarget | None:
        """Return nothing: each teacher is asked by itself, as one could hide beside another with larger numbers."""

    def flush(self) -> None:
        """Make safe what is kept for later runs."""
        for targets in self._teachers.values():
            targets.flush()

    def release(self) -> None:
        """Free what can be loaded again."""
        for targets in self._teachers.values():
            targets.release()

    def counts(self) -> dict[str, float]:
        """Return what was done on this worker since it began, added up; a row counts for each teacher that was asked for some of it."""
        return _added([targets.counts() for targets in self._teachers.values()])

    def facts(self) -> dict[str, float]:
        """Return what the manifest says of the targets, added up; a token that two teach takes the bytes of both."""
        return _added([targets.facts() for targets in self._teachers.values()])

    def _places(self, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Return which of a batch's valid positions a teacher teaches, and its share in each."""
        shares_N = self._shares_SK[_sources(batch)[:, 1:][batch.labels_BT[:, 1:] != IGNORE], number]
        places_M = shares_N.nonzero()[:, 0]
        return places_M, shares_N[places_M]

    def _taught(self, batch: Batch, number: int) -> Batch | None:
        """Return a teacher's examples of a batch on the host; none where none of them has a label."""
        sources_BT = _sources(batch)
        kept_BT = (self._shares_SK[sources_BT, number] > 0) & (sources_BT >= 0)
        columns = (batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)
        rows = [Row(*(column[row][kept_BT[row]].numpy() for column in columns)) for row in range(len(kept_BT))]
        taught = [row for row in rows if (row.labels[1:] != IGNORE).any()]
        return collate(taught) if taught else None


def _sources(batch: Batch) -> Tensor:
    return torch.zeros_like(batch.labels_BT) if batch.sources_BT is None else batch.sources_BT


def _one(target: Target) -> OneTarget:
    if isinstance(target, SeveralTarget):
        raise TypeError("one of several teachers is several itself")
    return target


def _added(found: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in found for name in each)
    return {name: sum(each.get(name, 0) for each in found) for name in names}
