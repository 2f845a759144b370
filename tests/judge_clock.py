"""Callers of one limiter on a simulated clock, against a provider that counts: sends are late, callers stall, the gate is away."""

import heapq
import itertools
import random
from collections import deque

from ray_jobs.judging.calls import Limits
from ray_jobs.judging.ledger import Spent
from ray_jobs.judging.limiter import Ask, Limiter, Report
from ray_jobs.judging.pace import LATE_S

ASK = Ask(prompt_tokens=100, most_completion_tokens=800, usd=0.01)
USED = (100, 50)
TICK_S = 0.05
WINDOW = 256
LONGEST_S = 3600.0


class Provider:
    """Refuses what passes a sliding window, or a bucket; refused requests count too, as at OpenAI.

    Args:
        requests: in any window; with a bucket, what flows in.
        bucket: requests that it holds: full at first, filled evenly; refused requests take nothing.
        tells: the headers name the limit.
        wait_s: told by a refusal; "exact" is until one more fits.
    """

    def __init__(
        self, *, requests=None, tokens=None, window_s=60.0, bucket=None, tells=True, latency=lambda: 0.3, wait_s=None, counts_refused=True
    ):
        self.requests, self.tokens, self.window_s, self.bucket = requests, tokens, window_s, bucket
        self.tells, self.latency, self.wait_s, self.counts_refused = tells, latency, wait_s, counts_refused
        self.sent, self.refused, self._recent = [], 0, deque()
        self._level, self._at = bucket or 0.0, 0.0

    def answer(self, now):
        """Return whether it is answered, after how long, the headers, and how long to wait."""
        wait_s = self._bucket_wait(now) if self.bucket else self._window_wait(now)
        over = wait_s > 1e-9
        self.sent.append(now)
        self.refused += over
        per_minute = 60.0 / self.window_s
        told = {
            "requests_per_minute": self.requests * per_minute if self.requests and self.tells else None,
            "tokens_per_minute": self.tokens * per_minute if self.tokens and self.tells else None,
        }
        return not over, 0.02 if over else self.latency(), told, wait_s if self.wait_s == "exact" else self.wait_s

    def _window_wait(self, now):
        while self._recent and self._recent[0] <= now - self.window_s + 1e-9:
            self._recent.popleft()
        most = min(self.requests or 10**9, (self.tokens or 10**12) // sum(USED))
        wait_s = self._recent[-int(most)] + self.window_s - now if len(self._recent) >= most else 0.0
        if self.counts_refused or wait_s <= 0:
            self._recent.append(now)
        return wait_s

    def _bucket_wait(self, now):
        rate = self.requests / self.window_s
        self._level, self._at = min(self.bucket, self._level + (now - self._at) * rate), now
        wait_s = max(0.0, 1.0 - self._level) / rate
        self._level -= wait_s <= 0
        return wait_s


class Caller:
    """What one simulated caller has.

    Args:
        stalls: pairs of times between which its process does not run.
    """

    def __init__(self, window, stalls):
        self.free, self.reports, self.paused, self.stalls = window, [], -1, deque(stalls)

    def runs_at(self, now):
        """Return when it next runs."""
        while self.stalls and self.stalls[0][1] <= now:
            self.stalls.popleft()
        return self.stalls[0][1] if self.stalls and self.stalls[0][0] <= now else now


class Play:
    """Events in the order of their time; a method for each kind."""

    def __init__(self, limiter, provider, callers, *, num_calls, gate_s, jitter_s, draw):
        self.limiter, self.provider, self.callers = limiter, provider, callers
        self.todo, self.done, self.now = num_calls, [], 0.0
        self._gate_s, self._jitter_s, self._draw = gate_s, jitter_s, draw
        self._events, self._order = [], itertools.count()

    def push(self, time, kind, i, what=None):
        heapq.heappush(self._events, (time, next(self._order), kind, i, what))

    def step(self):
        self.now, _, kind, i, what = heapq.heappop(self._events)
        runs_at = self.now if kind in {"act", "gate"} else self.callers[i].runs_at(self.now)
        if runs_at > self.now:
            self.push(runs_at, kind, i, what)
        else:
            getattr(self, kind)(i, what)

    def act(self, _, action):
        action()

    def tick(self, i, _):
        caller = self.callers[i]
        number = min(caller.free, self.todo, 128)
        self.todo, caller.free = self.todo - number, caller.free - number
        self.push(self._soon(self._gate_s), "gate", i, (number, caller.reports))
        caller.reports = []

    def gate(self, i, what):
        number, reports = what
        self.limiter.beat(self.now)
        lease = self.limiter.lease(str(i), [ASK] * number, reports, self.now)
        self.push(self._soon(self._gate_s), "lease", i, (number, lease))

    def lease(self, i, what):
        number, lease = what
        back = number - len(lease.grants)
        self.todo, self.callers[i].free = self.todo + back, self.callers[i].free + back
        for grant in lease.grants:
            self.push(self._soon(self._jitter_s) + grant.delay_s, "send", i, (grant, self.now + grant.delay_s))
        if not lease.stopped:
            self.push(self.now + max(TICK_S, min(lease.wait_s, 1.0)), "tick", i)

    def send(self, i, what):
        (grant, moment), caller = what, self.callers[i]
        if grant.episode <= caller.paused:
            caller.reports.append(Report("unsent", ASK, grant))
            self.todo, caller.free = self.todo + 1, caller.free + 1
            return
        if self.now - moment > LATE_S:
            caller.reports.append(Report("late", None, grant, late_s=self.now - moment))
        ok, after, told, wait_s = self.provider.answer(self.now)
        report = Report("ok", ASK, grant, *USED, **told) if ok else Report("refused", ASK, grant, wait_s=wait_s)
        self.push(self.now + after, "reply", i, report)

    def reply(self, i, report):
        caller = self.callers[i]
        caller.reports.append(report)
        caller.free += 1
        if report.result == "ok":
            self.done.append(self.now)
        else:
            self.todo, caller.paused = self.todo + 1, max(caller.paused, report.grant.episode)
            self._hand_back(i)

    def _hand_back(self, i):
        """Let a caller's sends to come look now whether their moment still holds."""
        mine = [event for event in self._events if event[2:4] == ("send", i) and event[4][0].episode <= self.callers[i].paused]
        self._events = [event for event in self._events if event not in mine]
        heapq.heapify(self._events)
        for event in mine:
            self.push(self.now, "send", i, event[4])

    def _soon(self, mean_s):
        return self.now + (self._draw.expovariate(1 / mean_s) if mean_s else 0.0)


def simulate(provider, *, num_calls, num_callers=1, limits=None, at=(), gate_s=0.0, jitter_s=0.0, stalls=None, seed=0):
    """Play callers that ask every 50 ms; return the limiter and the times of replies.

    Args:
        at: (time, action) pairs.
        gate_s: mean time of a message to the limiter, and back.
        jitter_s: mean lateness of a send.
        stalls: (mean seconds between, longest) of a caller's times without a processor.
    """
    limiter = Limiter(limits or Limits(), None, Spent(), now=0.0)
    callers = [Caller(WINDOW // num_callers, _stalls(stalls, random.Random(f"{seed} {i}"))) for i in range(num_callers)]
    play = Play(limiter, provider, callers, num_calls=num_calls, gate_s=gate_s, jitter_s=jitter_s, draw=random.Random(seed))
    for i in range(num_callers):
        play.push(0.001 * i, "tick", i)
    for time, action in at:
        play.push(time, "act", 0, action)
    while len(play.done) < num_calls:
        play.step()
        assert play.now < LONGEST_S, f"{len(play.done)} of {num_calls} done, {limiter.counters}"
    for i, caller in enumerate(callers):
        limiter.lease(str(i), [], caller.reports, play.now)
    return limiter, play.done


def _stalls(stalls, draw):
    now = 0.0
    while stalls and now < LONGEST_S:
        now += draw.expovariate(1 / stalls[0])
        end = now + draw.uniform(TICK_S, stalls[1])
        yield now, end
        now = end


def most_in(times, window_s):
    """Return the largest number of times in any half-open window."""
    first, most = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - window_s + 1e-9:
            first += 1
        most = max(most, last - first + 1)
    return most


def utilisation(provider, per_minute, *, after_s=1.0):
    """Return the share of the limit between the first second and the last send."""
    times = [time for time in provider.sent if time >= after_s]
    return (len(times) - 1) / (times[-1] - times[0]) * 60 / per_minute


def share_of_paced(done, per_minute, latency_s, *, share=0.97):
    """Return how long a loop takes that is paced by one who knows the limit, over how long these took."""
    return ((len(done) - 1) / (share * per_minute / 60) + latency_s) / max(done)
