"""What a person sees while a job works: one line a stage, a bar with ETA; all of it on stderr."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total, note) while work goes on."""
QUIET_LINE_EVERY_S = 15.0


def say(text: str) -> None:
    """Print one line for people on stderr, below any bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Bar:
    """A progress bar with ETA on a terminal; elsewhere one plain line every 15 seconds.

    Use as a context manager; call it with (done, total, note).
    """

    def __init__(self, label: str, unit: str = "it"):
        self._tqdm = tqdm(desc=label, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True)
        self._label = label
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` is done; `note` stands behind the bar."""
        self._tqdm.total = total
        self._tqdm.set_postfix_str(note, refresh=False)
        self._tqdm.n = done
        self._tqdm.refresh()
        if self._tqdm.disable:
            self._plain(done, total, note)

    def _plain(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if now - self._last < QUIET_LINE_EVERY_S or not done:
            return
        self._last = now
        eta_s = (now - self._start) / done * (total - done)
        print(f"{self._label}: {done}/{total}, {eta_s:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tqdm.close()
