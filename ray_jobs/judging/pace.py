"""The pace of calls below a limit that is known, told in mid-run, or only felt: pure arithmetic, the time is an argument.

A window of calls in flight does not hold a rate, as the replies' latency varies; so every send has its moment, one after the
other, never two at once: no start, pause or restart makes a burst, and a limit that is enforced within seconds is kept too.
"""

SHARE = 0.97
"""Of the limit: the rest is for clocks and networks that are not exact. A loop paced at 0.97 loses less to refusals than one at 1."""
FIRST_RATE = 10.0
"""Calls a second to an endpoint that tells no limit."""
SLOW_START = 2.0
"""Growth in a second until the first refusal."""
REGROWTH, PROBING = 1.05, 1.005
"""Growth in a second below and above 0.95 of the rate that was refused."""
JITTER_SHARE = 0.05
"""Up to this share of refusals is the network's doing: no reason to slow down."""
LEAST_OUTCOMES = 8
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
        self._next = self._next_by_tokens = self._seen = now
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
        return max(self._next, self._next_by_tokens, now)

    def take(self, tokens: float, now: float) -> float:
        """Return when a request of so many tokens may leave, and give that moment away."""
        moment = self.next_moment(now)
        self._most_tokens = max(self._most_tokens, tokens)
        self._next = moment + 1.0 / self.rate
        self._next_by_tokens = moment + self._token_seconds(tokens)
        return moment

    def correct(self, tokens: float) -> None:
        """Add the tokens that a request took beyond its estimate; below 0 it took fewer."""
        self._next_by_tokens += self._token_seconds(tokens)

    def pause(self, until: float) -> None:
        """Let nothing leave before."""
        self._next = max(self._next, until)

    def note(self, *, ok: int = 0, refused: int = 0) -> None:
        """Count outcomes: refusals are measured against them."""
        self._ok += ok
        self._refused += refused

    def slow_down(self) -> None:
        """After a refusal: aim lower by what share was refused, unless that is what jitter does."""
        total = self._ok + self._refused
        first = self._requests is None and not self._refused_rate
        if total < LEAST_OUTCOMES and not first:
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
        if self._requests is None and self._next > now:
            factor = SLOW_START if not self._refused_rate else REGROWTH if self._rate < 0.95 * self._refused_rate else PROBING
            self._rate *= factor**passed

    def _token_seconds(self, tokens: float) -> float:
        if not self._tokens:
            return 0.0
        # a window may begin right before a request: the largest must fit beside what the pace allows
        room = max(min(SHARE * self._tokens, self._tokens - self._most_tokens), self._tokens / 2)
        return tokens / (room * self._scale) * SECONDS
