"""What a provider allows a minute, enforced as a bucket or as a sliding window; every time is given, none is read."""

from collections import deque
from typing import Protocol

MINUTE_S = 60.0


class Limit(Protocol):
    """Amounts (requests or tokens) that may pass."""

    def wait_s(self, now: float, amount: float) -> float:
        """Return the seconds until so much may pass; 0 where it may now."""

    def take(self, now: float, amount: float) -> None:
        """Count an amount as passed."""

    def left(self, now: float) -> float:
        """Return what may pass now."""


class Bucket:
    """Full at first, refilled evenly: bursts of what it holds, then the rate.

    Args:
        per_minute: the rate.
        span_s: seconds of the rate that it holds; a provider's minute is 60.
    """

    def __init__(self, per_minute: float, span_s: float):
        self.rate = per_minute / MINUTE_S
        self.capacity = self.rate * span_s
        self._level, self._at = self.capacity, 0.0

    def left(self, now: float) -> float:
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def wait_s(self, now: float, amount: float) -> float:
        # more than the bucket holds passes when it is full, or it never would
        return max(0.0, min(amount, self.capacity) - self.left(now)) / self.rate

    def take(self, now: float, amount: float) -> None:
        self._level = self.left(now) - amount


class Window:
    """So much in any `span_s` seconds: a client that sends a minute's share at once is refused.

    Args:
        per_minute: the rate.
        span_s: length of the window.
    """

    def __init__(self, per_minute: float, span_s: float):
        self.span_s = span_s
        self.capacity = per_minute / MINUTE_S * span_s
        self._passed: deque[tuple[float, float]] = deque()

    def left(self, now: float) -> float:
        while self._passed and self._passed[0][0] <= now - self.span_s:
            self._passed.popleft()
        return self.capacity - sum(amount for _, amount in self._passed)

    def wait_s(self, now: float, amount: float) -> float:
        missing = min(amount, self.capacity) - self.left(now)
        wait = 0.0
        for at, passed in self._passed:
            if missing <= 0:
                break
            missing -= passed
            wait = at + self.span_s - now
        return wait

    def take(self, now: float, amount: float) -> None:
        self._passed.append((now, amount))


KINDS = {"bucket": Bucket, "window": Window}


def most_in_window(times: list[float], span_s: float) -> int:
    """Return the largest number of sorted times that lie in a half-open window of so many seconds."""
    most, first = 0, 0
    for last, at in enumerate(times):
        while times[first] <= at - span_s:
            first += 1
        most = max(most, last - first + 1)
    return most
