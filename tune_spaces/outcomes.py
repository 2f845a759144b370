"""What became of each trial of a sweep, also of those that never reported a number."""

from collections.abc import Callable
from typing import Any

from ray import tune


class Outcomes(tune.Callback):
    """Remembers each started trial's point and, where it failed, the reason.

    Args:
        on_end: called after each trial with (point, reason); the reason is empty where it did not fail.
    """

    def __init__(self, on_end: Callable[[dict[str, Any], str], None]):
        self._on_end = on_end
        self._points: dict[str, dict[str, Any]] = {}
        self._reasons: dict[str, str] = {}

    @property
    def rows(self) -> list[tuple[dict[str, Any], str]]:
        """The (point, reason) of every trial that was started, in that order."""
        return [(point, self._reasons.get(trial_id, "")) for trial_id, point in self._points.items()]

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Remember the point."""
        self._points[trial.trial_id] = dict(trial.config)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Pass the end on."""
        self._on_end(dict(trial.config), "")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Remember the reason and pass the end on."""
        error = trial.get_pickled_error() or trial.get_error()
        cause = getattr(error, "cause", None) or error
        self._reasons[trial.trial_id] = " ".join(str(cause).split()) or type(cause).__name__
        self._on_end(dict(trial.config), self._reasons[trial.trial_id])
