"""One limiter for all callers of a cluster: moments to send at, in blocks; pauses; the budget; when to stop.

Pure: every method takes the time of one monotonic clock, so neither a clock that is set nor a laptop that slept lets calls
through in a burst. Callers come with a block of asks and the reports of what became of earlier ones, and leave with moments
for as many as may be sent within HORIZON_S: it is no question per call, and nobody holds moments for long.
"""

import random
from typing import Literal, NamedTuple

from ray_jobs.judging.calls import Budget, Counters, Limits
from ray_jobs.judging.ledger import Spent
from ray_jobs.judging.pace import Pace

HORIZON_S = 0.25
PROOF_S = 0.05
LONGEST_WAIT_S = 120.0
"""Longer than two of the minutes that limits are told for: the endpoint wants a pause, not patience."""
LONGEST_BACKOFF_S = 60.0
LONGEST_REFUSAL_S = 600.0
FAILED_IN_A_ROW = 10
"""Calls given up one after the other without a reply between them: the endpoint is broken, not the calls."""
SILENT_S = 30.0
"""A caller that has not been heard for so long is dead: what it had in flight may have been billed."""
DRIVER_SILENT_S = 2.0
LEARNING = 0.1


class Ask(NamedTuple):
    """A request that wants to leave.

    Args:
        prompt_tokens: an own count.
        most_completion_tokens: the request's own limit.
        usd: what it costs at most; 0 where prices are unknown.
        is_again: it was sent before, and failed.
    """

    prompt_tokens: int
    most_completion_tokens: int
    usd: float = 0.0
    is_again: bool = False


class Grant(NamedTuple):
    """A moment to send at, from now; the rest goes back with the report."""

    delay_s: float
    tokens: float
    usd: float
    episode: int
    taken: float


class Lease(NamedTuple):
    """Grants for the first of the asks; with none, when to ask again; `stopped` ends all asking."""

    grants: tuple[Grant, ...] = ()
    wait_s: float = 0.0
    stopped: str = ""


Stop = Literal["pause", "endpoint", "storage"]
"""pause: the same command goes on later; endpoint: no call can succeed; storage: nothing can be kept."""
Result = Literal["ok", "refused", "failed", "gave_up", "unsent", "late"]


class Report(NamedTuple):
    """What became of a grant.

    Args:
        result: ok; refused for pace; failed and to be sent again; gave_up where it is not; unsent where it never left;
            late, with a grant and no ask, where it has just left.
        ask: as it was asked; None for a report without a grant.
        may_be_billed: no reply came, but the endpoint may have made one.
        is_doubtful: an earlier send of this call may have been billed.
        retry: it counts as sent again for another reason than pace.
        wait_s: told by a refusal.
        late_s: after its moment.
        is_unreachable: there was no connection.
        is_of_row: the text itself is refused, others are not.
        stop: no further call can succeed, as this says.
        is_storage: what failed is the ledger.
    """

    result: Result
    ask: Ask | None = None
    grant: Grant | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_estimated: bool = False
    usd: float | None = 0.0
    may_be_billed: bool = False
    is_doubtful: bool = False
    retry: bool = False
    paid_twice: bool = False
    wait_s: float | None = None
    late_s: float = 0.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    error: str = ""
    is_unreachable: bool = False
    is_of_row: bool = False
    stop: str = ""
    is_storage: bool = False


class _Held:
    """What one caller has in flight."""

    def __init__(self, now: float):
        self.seen, self.usd, self.calls = now, 0.0, 0


class Limiter:
    """Grants sends to callers.

    Args:
        spent: what counts against the budget from before.
        now: seconds of the monotonic clock that all other methods are given.
    """

    def __init__(self, limits: Limits, budget: Budget | None, spent: Spent, *, now: float, seed: int = 0):
        self._pace = Pace(requests_per_minute=limits.requests_per_minute, tokens_per_minute=limits.tokens_per_minute, now=now)
        self._budget = budget or Budget()
        self._usd, self._calls = spent.usd or 0.0, spent.calls
        self._held: dict[str, _Held] = {}
        self._is_proven = False
        self._prover: str | None = None  # who sends the one call that shows whether any can succeed
        self._episode = self._vain_episodes = self._failed_in_a_row = 0
        self._refused_since: float | None = None
        self._prompt_ratio, self._completion_tokens = 1.0, 0.0
        self._random = random.Random(seed)
        self._driver_seen = now
        self.counters = Counters(usd=0.0)
        self.stopped = ""
        self.why: Stop = "pause"
        self.num_of_rows = 0

    def beat(self, now: float) -> None:
        """Note that the driver lives: without it nothing is granted."""
        self._driver_seen = now

    def lease(self, caller: str, asks: list[Ask], reports: list[Report], now: float) -> Lease:
        """Take a caller's reports, and grant what may leave soon."""
        held = self._held.setdefault(caller, _Held(now))
        held.seen = now
        for report in reports:
            self._take(held, report, now)
        self._drop_silent(now)
        self._pace.grow(now)
        if self.stopped:
            return Lease(stopped=self.stopped)
        if now - self._driver_seen > DRIVER_SILENT_S:
            return Lease(wait_s=HORIZON_S)
        return self._grant(caller, asks, now) if asks else Lease(wait_s=1.0)

    def _grant(self, caller: str, asks: list[Ask], now: float) -> Lease:
        grants: list[Grant] = []
        held = self._held[caller]
        for ask in asks if self._is_proven else asks[:1]:
            if self._pace.next_moment(now) > now + HORIZON_S or not self._may_start(caller, ask):
                break
            if not self._affords(ask):
                return self._wait_for_money(grants)
            self._prover = caller
            held.usd, held.calls = held.usd + ask.usd, held.calls + 1
            tokens = self._estimate(ask)
            moment, taken = self._pace.take(tokens, now)
            grants.append(Grant(moment - now, tokens, ask.usd, self._episode, taken))
        wait = max(self._pace.next_moment(now) - now - HORIZON_S / 2, 0.0) if self._is_proven else PROOF_S
        return Lease(tuple(grants), wait)

    def _may_start(self, caller: str, ask: Ask) -> bool:
        """The first call goes alone, and is the first until it succeeds or is given up."""
        is_first = self._prover is None or (self._prover == caller and ask.is_again and not self._in_flight())
        return self._is_proven or is_first

    def _affords(self, ask: Ask) -> bool:
        usd, calls = self._usd + sum(held.usd for held in self._held.values()), self._calls + self._in_flight()
        limit = self._budget
        return (limit.usd is None or usd + ask.usd <= limit.usd) and (limit.calls is None or calls + 1 <= limit.calls)

    def _wait_for_money(self, grants: list[Grant]) -> Lease:
        if not self._in_flight():  # nothing will come back: what is left buys no further call
            limit = f"{self._budget.calls} calls" if self._budget.usd is None else f"${self._budget.usd:g}"
            self.stopped = (
                f"the budget of {limit} is spent ({self._calls} calls, ${self._usd:.4f}; one more could pass it): "
                "raise [judge] budget_usd or max_calls and run the same command again"
            )
            return Lease(stopped=self.stopped)
        return Lease(tuple(grants), HORIZON_S)

    def _in_flight(self) -> int:
        return sum(held.calls for held in self._held.values())

    def _estimate(self, ask: Ask) -> float:
        completion = min(self._completion_tokens or ask.most_completion_tokens, ask.most_completion_tokens)
        return ask.prompt_tokens * self._prompt_ratio + completion

    def _take(self, held: _Held, report: Report, now: float) -> None:
        if report.ask is not None:
            held.usd, held.calls = held.usd - report.ask.usd, held.calls - 1
        self._count(report)
        self._pay(report)
        self._pace.learn(report.requests_per_minute, report.tokens_per_minute)
        if report.result == "unsent":
            self._prover = None
            if report.grant is not None:
                self._pace.hand_back(report.grant.taken, report.grant.tokens)
        elif report.result == "late" and report.grant is not None:
            self._pace.put_off(report.grant.taken, now, report.late_s)
        elif report.result == "ok":
            self._learn_tokens(report)
            self._prove(report, now)
            self._vain_episodes, self._failed_in_a_row, self._refused_since = 0, 0, None
            self._pace.note(ok=1)
        elif report.result == "refused":
            self._refuse(report, now)
        elif report.result == "gave_up":
            self._give_up(report, now)
        if report.stop:
            self.stop(report.stop, "storage" if report.is_storage else "endpoint")

    def stop(self, reason: str, why: Stop) -> None:
        """Grant nothing more; the first reason stays."""
        if not self.stopped:
            self.stopped, self.why = reason, why

    def _prove(self, report: Report, now: float) -> None:
        """The endpoint answers: the next calls need not wait for each other."""
        if not self._is_proven and report.grant is not None:
            self._pace.put_off(report.grant.taken, now)  # its way was a new client's and a new connection's, how long is unknown
        self._is_proven = True

    def _give_up(self, report: Report, now: float) -> None:
        if report.is_unreachable and not self._is_proven:
            self.stop(report.error, "endpoint")
        self._prove(report, now)
        self.num_of_rows += report.is_of_row
        self._failed_in_a_row += not report.is_of_row
        if self._failed_in_a_row >= FAILED_IN_A_ROW:
            reason = f"{FAILED_IN_A_ROW} calls failed one after the other, the last: {report.error}"
            self.stop(reason, "pause" if self.counters.ok else "endpoint")

    def _refuse(self, report: Report, now: float) -> None:
        """Pause everybody; refusals of what left before the pause began are of the same episode."""
        self._pace.note(refused=1)
        self._refused_since = now if self._refused_since is None else self._refused_since
        if (report.wait_s or 0.0) > LONGEST_WAIT_S:
            self.stop(f"the endpoint asks to wait {report.wait_s:.0f} s: run the same command again then", "pause")
        elif now - self._refused_since > LONGEST_REFUSAL_S:
            self.stop(f"the endpoint has refused every call for {LONGEST_REFUSAL_S:.0f} s: {report.error}", "pause")
        elif report.grant is not None and report.grant.episode == self._episode:
            self._episode += 1
            backoff = min(2.0**self._vain_episodes, LONGEST_BACKOFF_S) * self._random.uniform(0.5, 1.0)
            self._vain_episodes += 1
            self._pace.slow_down()
            self._pace.pause(now + (report.wait_s if report.wait_s is not None else backoff), now)
        elif report.wait_s is not None:
            self._pace.pause(now + report.wait_s, now)

    def _learn_tokens(self, report: Report) -> None:
        if report.ask is None or report.grant is None:
            return
        self._pace.correct(report.prompt_tokens + report.completion_tokens - report.grant.tokens)
        ratio = report.prompt_tokens / max(report.ask.prompt_tokens, 1)
        weight = LEARNING if self._completion_tokens else 1.0
        self._prompt_ratio += weight * (ratio - self._prompt_ratio)
        self._completion_tokens += weight * (report.completion_tokens - self._completion_tokens)

    def _pay(self, report: Report) -> None:
        if report.result == "ok" or report.prompt_tokens or report.may_be_billed:
            self._calls += 1
            worst = report.ask.usd if report.ask is not None else 0.0
            self._usd += worst if report.may_be_billed or report.usd is None else report.usd

    def _count(self, report: Report) -> None:
        was = self.counters
        self.counters = was._replace(
            sent=was.sent + (report.ask is not None and report.result != "unsent"),
            ok=was.ok + (report.result == "ok"),
            prompt_tokens=was.prompt_tokens + report.prompt_tokens,
            completion_tokens=was.completion_tokens + report.completion_tokens,
            estimated=was.estimated + report.is_estimated,
            rate_limited=was.rate_limited + (report.result == "refused"),
            retries=was.retries + report.retry,
            unscored=was.unscored + (report.result == "gave_up"),
            paid_twice=was.paid_twice + report.paid_twice,
            possibly_paid_twice=was.possibly_paid_twice + (report.is_doubtful and (report.result == "ok" or report.may_be_billed)),
            usd=None if was.usd is None or report.usd is None else was.usd + report.usd,
        )

    def _drop_silent(self, now: float) -> None:
        for name in [name for name, held in self._held.items() if now - held.seen > SILENT_S]:
            lost = self._held.pop(name)
            self._prover = None if self._prover == name else self._prover
            self._usd, self._calls = self._usd + lost.usd, self._calls + lost.calls
