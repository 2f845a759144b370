"""When a pool of teachers grows and shrinks: plain numbers, no Ray."""

from dataclasses import dataclass

GROW_AFTER_S = 5.0
"""Time that students waited, together, before another actor is started."""
SHRINK_AFTER_S = 30.0
"""Time without work after which an actor that is not needed ends."""


@dataclass
class PoolSize:
    """Decides between a fewest and a most number of actors."""

    fewest: int
    most: int
    grow_after_s: float = GROW_AFTER_S
    shrink_after_s: float = SHRINK_AFTER_S
    _waited_s: float = 0.0
    _since: float = 0.0

    def note_wait(self, seconds: float, *, now: float) -> None:
        """Count how long a student waited up to now; what lies before the last start of an actor does not count."""
        self._waited_s += min(seconds, max(0.0, now - self._since))

    def note_start(self, *, now: float) -> None:
        """Begin to count anew: another actor works."""
        self._waited_s, self._since = 0.0, now

    def grows(self, num_actors: int, *, starting: int) -> bool:
        """Return whether another actor should start.

        Args:
            starting: actors that do not work yet.
        """
        return num_actors < self.most and not starting and self._waited_s >= self.grow_after_s

    def shrinks(self, num_actors: int, *, coldest_s: float) -> bool:
        """Return whether the actor that has been without work for longest should end.

        Args:
            coldest_s: for how long.
        """
        return num_actors > self.fewest and coldest_s >= self.shrink_after_s
