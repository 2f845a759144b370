"""Where a step's time goes: its parts by the device's own clock, and communication from a profile of few steps."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._C._profiler import RecordScope
from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler

PARTS = ("data", "forward", "backward", "optimizer")
STEP = "step"
PROFILE_EVERY_STEPS = 50
_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")


class Clock:
    """Adds up the time of named parts: `with clock("forward"): ...`.

    On a GPU each part is bracketed by events on the current stream and read once the GPU has passed them. So the times are
    those of the device's own timeline, which is what a step waits for, and nothing is synchronised before `take`.

    Args:
        device: where the parts compute.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block's time as that part's; blocks may stand inside each other."""
        began = self._mark()
        yield
        self._pending.append((part, began, self._mark()))
        self._settle()

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call; waits for the GPU to finish them."""
        if self._on_gpu and self._pending:
            self._pending[-1][2].synchronize()
        self._settle()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        while self._pending and (not self._on_gpu or self._pending[0][2].query()):
            part, began, ended = self._pending.popleft()
            seconds = began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return what part of the time under STEP each of PARTS took, and `other`; they add up to 1.

    Args:
        seconds: by part, from `Clock.take`, STEP among them.
    """
    whole = max(seconds[STEP], 1e-9)
    found = {part: seconds.get(part, 0.0) / whole for part in PARTS}
    return {**found, "other": max(0.0, 1.0 - sum(found.values()))}


class CommunicationProbe:
    """How much of a step some collective is under way, from a profile of the second step and then of one in 50.

    The time lies inside the other parts (DistributedDataParallel communicates while it computes the backward pass) and counts
    waiting for a slower worker. Every strategy's collectives pass through torch.distributed, so its events tell for all of
    them; the steps between are not touched.

    Args:
        world_size: with one worker nothing is profiled.
        first_step: the step this process begins with.
    """

    def __init__(self, *, world_size: int, first_step: int):
        self._world_size, self._first_step = world_size, first_step
        self.share = 0.0
        """Share of the last profiled step, 0 to 1; 0 before the first."""

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Profile the block if it is this step's turn."""
        # not the first: it waits for what is set up once
        if self._world_size == 1 or (step - self._first_step) % PROFILE_EVERY_STEPS != 1:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its start and end on stderr
        with _collectives() as found:
            began = time.perf_counter_ns()
            yield
            _wait_for_gpu()
            took = time.perf_counter_ns() - began
        self.share = min(1.0, covered(found) / took)


@contextlib.contextmanager
def _collectives() -> Iterator[list[tuple[int, int]]]:
    """Profile the block, and fill the list with the (start, end) of each collective in nanoseconds.

    The public profilers record every operator, about 1 KB each and some 40,000 in a micro-batch of a small model; here only
    those in the scope that torch.distributed opens for a collective, and on a GPU its kernels.
    """
    on_gpu = torch.cuda.is_initialized()
    settings = torch.autograd.profiler.profile(use_kineto=True, use_device="cuda" if on_gpu else None)
    _prepare_profiler(settings.config(), settings.kineto_activities)
    _enable_profiler(settings.config(), settings.kineto_activities, {RecordScope.USER_SCOPE})
    found: list[tuple[int, int]] = []
    try:
        yield found
    finally:
        events = _disable_profiler().events()
    for event in events:
        if event.name().startswith(_COLLECTIVES):
            found.append((event.start_ns(), event.start_ns() + event.duration_ns()))


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def covered(intervals: list[tuple[int, int]]) -> int:
    """Return the length of the union of (start, end) intervals."""
    total, reached = 0, 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
