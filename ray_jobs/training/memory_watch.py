"""A thread that sees what RLIMIT_DATA does not: memory of child processes, and memory shared with others."""

import threading
from collections.abc import Callable
from types import TracebackType

import psutil

from ray_jobs.core.memory import held_bytes
from ray_jobs.core.progress import say

EVERY_S = 1.0
"""A sample reads of every process on the node, to find the children: about 5 ms where there are a hundred."""


class MemoryWatch:
    """Samples what this process and its children hold for as long as the block lasts, and reports the first breach.

    Args:
        limit_bytes: what they may hold together.
        on_breach: called once, from the thread, with the bytes held. The thread cannot stop the work; this can.
        every_s: time between samples.
    """

    def __init__(self, limit_bytes: int, *, on_breach: Callable[[int], None], every_s: float = EVERY_S):
        self._limit, self._on_breach, self._every_s = limit_bytes, on_breach, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                held = held_bytes()
            except (OSError, psutil.Error) as error:
                say(f"memory watch: this sample failed ({error}); the next one is in {self._every_s:g} s")
                continue
            if held > self._limit:
                self._on_breach(held)
                return
