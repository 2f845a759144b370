"""The dynamic loss scale of float16, where torch's GradScaler cannot be: its rule and its state are the same."""

from typing import Any


class LossScale:
    """Halves after a step whose gradients overflowed, doubles after 2000 steps without one.

    Source:
        Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; the numbers are those of torch.amp.GradScaler.
    """

    def __init__(self) -> None:
        self._state = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}

    @property
    def value(self) -> float:
        """What the loss is multiplied by."""
        return self._state["scale"]

    def update(self, *, overflow: bool) -> None:
        """Count a step."""
        state = self._state
        if overflow:
            state["scale"] *= state["backoff_factor"]
        state["_growth_tracker"] = 0 if overflow else state["_growth_tracker"] + 1
        if state["_growth_tracker"] == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            state["_growth_tracker"] = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers that GradScaler.state_dict has."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back a state, of this class or of GradScaler."""
        self._state = dict(state)
