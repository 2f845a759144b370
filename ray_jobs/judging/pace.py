"""The pace of calls below a limit that is known, told in mid-run, or only felt: pure arithmetic, the time is an argument.

A window of calls in flight does not hold a rate, as the replies' latency varies; so every send has its moment, one after the
other, never two at once: no start, pause or restart makes a burst. Of a limit that is told, moments that nobody took are made up
for at up to CATCH_UP times the pace, but so that no stretch of SHORTEST_WINDOW_S has more of them than an even pace has, and
until the first refusal.
"""

import math
from bisect import insort
from collections import deque

SHARE = 0.97
"""Of the limit: the rest is for clocks and networks that are not exact. A loop paced at 0.97 loses less to refusals than one at 1."""
SHORTEST_WINDOW_S = 1.0
"""Within which a minute's limit is enforced. Source: OpenAI, "Rate limits"; Microsoft, "Azure OpenAI quota": 1 s or 10 s."""
LATE_S = 0.01
"""A third of what SHARE leaves of that window: what is sent later after its moment is counted at the time when it left."""
CATCH_UP = 2.0
"""Times the even pace: a second that was lost is made up for within a second."""
MOST_REMEMBERED = 4096
FIRST_RATE = 10.0
"""Calls a second to an endpoint that tells no limit."""
SLOW_START = 2.0
"""Growth in a second until the first refusal."""
REGROWTH, PROBING = 1.05, 1.005
"""Growth in a second below and above 0.95 of the rate that was refused."""
JITTER_SHARE = 0.05
"""Up to this share of refusals is the network's doing: no reason to slow down."""
LEAST_OUTCOMES, LEAST_OUTCOMES_TOLD = 8, 20
"""Before a share of refusals is believed; of a limit that is told, one in so many is within JITTER_SHARE."""
SECONDS = 60.0


class Pace:
    """Gives each request its moment.

    Args:
        requests_per_minute: the limit as configured; the endpoint's word may only lower it.
        tokens_per_minute: as `requests_per_minute`.
        now: seconds of a monotonic clock.
    """

    def __init__(self, *, requests_per_minute: float | None, tokens_per_minute: float | None, now: float):
        self._own = (requests_per_minute, tokens_per_minute)
        self._requests, self._tokens = self._own
        self._scale, self._refused_scale = 1.0, 1.0
        self._rate, self._refused_rate = FIRST_RATE, 0.0
        self._next_by_tokens = self._seen = self._paused_until = now
        self._paused_s = 0.0
        self._taken: deque[float] = deque(maxlen=MOST_REMEMBERED)  # moments given away, on a clock that stands still in pauses
        self._catches_up = True
        self._most_tokens = 0.0
        self._ok = self._refused = 0

    @property
    def requests_per_minute(self) -> float | None:
        """The limit as far as it is known."""
        return self._requests

    @property
    def tokens_per_minute(self) -> float | None:
        """As `requests_per_minute`."""
        return self._tokens

    @property
    def rate(self) -> float:
        """Requests a second that are aimed at, if tokens allow."""
        return self._rate if self._requests is None else self._requests / SECONDS * SHARE * self._scale

    def learn(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        """Take the limits that a reply's headers tell."""
        own_requests, own_tokens = self._own
        if requests_per_minute:
            self._requests = min(requests_per_minute, own_requests or requests_per_minute)
        if tokens_per_minute:
            self._tokens = min(tokens_per_minute, own_tokens or tokens_per_minute)

    def next_moment(self, now: float) -> float:
        """Return when the next request may leave."""
        return max(self._next_by_requests(), self._next_by_tokens, now)

    def take(self, tokens: float, now: float) -> tuple[float, float]:
        """Return when a request of so many tokens may leave, and what to hand back should it not; that moment is given away."""
        moment = self.next_moment(now)
        self._most_tokens = max(self._most_tokens, tokens)
        self._taken.append(moment - self._paused_s)
        self._next_by_tokens = moment + self._token_seconds(tokens)
        return moment, self._taken[-1]

    def hand_back(self, taken: float, tokens: float) -> None:
        """Take back a moment at which nothing left, with its tokens."""
        if taken in self._taken:
            self._taken.remove(taken)
            self.correct(-tokens)

    def put_off(self, taken: float, now: float, late_s: float = math.inf) -> None:
        """Count a request as having left so long after its moment, by default just now: so the endpoint counts it."""
        if taken in self._taken:
            self._taken.remove(taken)
            insort(self._taken, min(taken + late_s, now - self._paused_s))

    def correct(self, tokens: float) -> None:
        """Add the tokens that a request took beyond its estimate; below 0 it took fewer."""
        self._next_by_tokens += self._token_seconds(tokens)

    def pause(self, until: float, now: float) -> None:
        """Let nothing leave before; what was left before counts as that much later, as the one who refuses counts it so."""
        self._paused_s += max(until - max(self._paused_until, now), 0.0)
        self._paused_until = max(self._paused_until, until)

    def note(self, *, ok: int = 0, refused: int = 0) -> None:
        """Count outcomes: refusals are measured against them."""
        self._ok += ok
        self._refused += refused

    def slow_down(self) -> None:
        """After a refusal: catch up no more, and aim lower by what share was refused, unless that is what jitter does."""
        self._catches_up = False  # the endpoint counts shorter stretches, or requests arrive at other times than they leave
        total = self._ok + self._refused
        first = self._requests is None and not self._refused_rate
        if total < (LEAST_OUTCOMES if self._requests is None else LEAST_OUTCOMES_TOLD) and not first:
            return
        share = self._refused / max(total, 1)
        self._ok = self._refused = 0
        if self._requests is None:
            self._refused_rate = self._rate
            self._rate = max(0.05, self._rate * (0.7 if first else min(0.95, 1.0 - 0.7 * share)))
        elif share > JITTER_SHARE:
            self._refused_scale = self._scale
            self._scale = max(0.02, self._scale * (1.0 - 0.7 * share))

    def grow(self, now: float) -> None:
        """Aim higher with the time that has passed while requests were waiting for their moment."""
        passed, self._seen = min(now - self._seen, 1.0), now
        if self.next_moment(now) <= now:
            return  # nobody waits for the pace: it is not known to be too low
        factor = REGROWTH if self._scale < 0.95 * self._refused_scale else PROBING
        self._scale = min(1.0, self._scale * factor**passed)
        if self._requests is None and self._next_by_requests() > now:
            factor = SLOW_START if not self._refused_rate else REGROWTH if self._rate < 0.95 * self._refused_rate else PROBING
            self._rate *= factor**passed

    def _next_by_requests(self) -> float:
        """Return when requests allow the next: as far from the one `number` before as an even pace has it, and not at once."""
        if not self._taken:
            return self._paused_until
        number = min(math.ceil(self.rate * SHORTEST_WINDOW_S), len(self._taken))
        fastest = self.rate * (CATCH_UP if self._requests is not None and self._catches_up else 1.0)
        moment = max(self._taken[-number] + number / self.rate, self._taken[-1] + 1.0 / fastest)
        return max(moment + self._paused_s, self._paused_until)

    def _token_seconds(self, tokens: float) -> float:
        if not self._tokens:
            return 0.0
        # a window may begin right before a request: the largest must fit beside what the pace allows
        room = max(min(SHARE * self._tokens, self._tokens - self._most_tokens), self._tokens / 2)
        return tokens / (room * self._scale) * SECONDS
