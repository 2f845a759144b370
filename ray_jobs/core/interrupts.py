"""SIGTERM (a scheduler, `kill`, the stop of a submitted job) ends a job as Ctrl-C does: exit code 130, and resumable."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


def terminate_as_interrupt() -> None:
    """Let SIGTERM do what SIGINT does, whoever handles that at the time; only the main thread may say so, others pass."""
    if _is_main():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a script starts with `&`
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def interrupts_of_ray_train() -> Iterator[None]:
    """Turn what Ray Train makes of an interrupt, which is to exit with success, back into KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if _is_main():
            signal.signal(signal.SIGINT, before)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
