"""What became of each trial of a sweep, also of those that never reported a number."""

from collections.abc import Callable
from typing import Any

from ray import tune


class Outcomes(tune.Callback):
    """Remembers each trial that was started.

    Args:
        on_end: called after each trial with (point, whether it failed).
    """

    def __init__(self, on_end: Callable[[dict[str, Any], bool], None]):
        self._on_end = on_end
        self._trials: dict[str, Any] = {}

    def rows(self) -> list[tuple[dict[str, Any], str]]:
        """Return (point, reason) of every trial, in the order they started; the reason is "" where it did not fail.

        Tune writes the errors down at the end: read this after the sweep, before its folder is deleted.
        """
        return [(dict(trial.config), _reason(trial)) for trial in self._trials.values()]

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Remember the trial."""
        self._trials[trial.trial_id] = trial

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Pass the end on."""
        self._on_end(dict(trial.config), False)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Pass the end on."""
        self._on_end(dict(trial.config), True)


def _reason(trial: Any) -> str:
    error = trial.get_pickled_error() or trial.get_error()
    if error is None:
        return ""
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split()) or type(cause).__name__
