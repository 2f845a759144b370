"""SIGTERM (a scheduler, `kill`, the stop of a submitted job) ends a job as Ctrl-C does: exit code 130, and resumable."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def hangups_blocked() -> Iterator[None]:
    """Block SIGHUP until the block ends, and for good in the processes that it starts.

    A terminal that closes hangs up its whole foreground group: those who work for this process are to outlive it by what they
    have in flight, and end with it by other means.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interrupt_late(on_interrupt: Callable[[], None], *, patience_s: float) -> Iterator[None]:
    """Raise the first interrupt (Ctrl-C, SIGTERM, a terminal that closes) only when the block ends, a second one at once.

    A terminal that closes may hang up twice: its shell does, and the kernel once more when the shell has gone. That is one.
    Outside the main thread it does nothing.

    Args:
        on_interrupt: called when the first one comes, in another thread: it is to bring the block to its end.
        patience_s: the block is interrupted all the same when it lasts longer than that.

    Raises:
        KeyboardInterrupt: there was one.
    """
    if not _is_main():
        yield
        return
    held = _Held()
    threading.Thread(target=held.wait, args=(on_interrupt, patience_s), name="interrupt", daemon=True).start()
    for number in held.handlers:
        signal.signal(number, held.hold)
    try:
        yield
    finally:
        held.restore()
        held.is_over.set()
        held.came.set()
    if held.first is not None:
        raise KeyboardInterrupt


class _Held:
    """The interrupts that a block of the main thread holds back."""

    def __init__(self) -> None:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        self.handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
        self.came, self.is_over, self._is_late = threading.Event(), threading.Event(), threading.Event()
        self.first: int | None = None

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def hold(self, number: int, frame: FrameType | None) -> None:
        self.restore()
        if number == signal.SIGHUP:
            signal.signal(number, self._pass_by)
        self.first = number
        self.came.set()

    def _pass_by(self, number: int, frame: FrameType | None) -> None:
        if self._is_late.is_set():
            self.restore()
            signal.raise_signal(number)

    def wait(self, on_interrupt: Callable[[], None], patience_s: float) -> None:
        """Call on_interrupt when the first one comes, and let it through when the block lasts too long."""
        self.came.wait()
        if not self.is_over.is_set():
            on_interrupt()
        if not self.is_over.wait(patience_s):
            self._is_late.set()
            signal.pthread_kill(threading.main_thread().ident or 0, self.first or signal.SIGINT)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
