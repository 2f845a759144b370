"""What a loss with targets passes on to them from the training loop: questions, batches to come, checkpoints, figures."""

from ray_jobs.distillation.alignment import check_alignment
from ray_jobs.distillation.targets import Target, Targets
from ray_jobs.training.batches import Batch


class AsksTargets:
    """The methods of `LossHooks`, for a loss with `targets`."""

    targets: Targets
    _is_aligned = False

    def ask(self, batch: Batch) -> Target:
        """Return the teacher's word on a micro-batch; the first time its alignment is checked, before anything is trained on it.

        Raises:
            TrainingFailed: the targets are of other positions than they should be.
        """
        target = self.targets.of(batch)
        self._is_aligned = self._is_aligned or check_alignment(self.targets, batch)
        return target

    @property
    def ahead(self) -> int:
        """Steps whose micro-batches are announced before they are asked for."""
        return self.targets.ahead

    def announce(self, batches: list[Batch]) -> None:
        """Tell the targets what they will be asked for."""
        self.targets.announce(batches)

    def flush(self) -> None:
        """Make safe what the targets keep."""
        self.targets.flush()

    def counts(self) -> dict[str, float]:
        """Return what was done on this worker since it began; `wait_teacher_s` is time in which the student waited."""
        return {"wait_teacher_s": self.targets.waited_s, **self.targets.counts()}

    def facts(self) -> dict[str, float]:
        """Return what the manifest says of the targets."""
        return self.targets.facts()
