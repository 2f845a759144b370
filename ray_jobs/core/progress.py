"""What a person sees while a job works: one line a stage, a bar with ETA; all of it on stderr."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total, note) while work goes on."""
QUIET_LINE_EVERY_S = 15.0
NOTE_LINE_EVERY_S = 2.0


def say(text: str) -> None:
    """Print one line for people on stderr, below any bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Bar:
    """A progress bar with ETA on a terminal; elsewhere one plain line every 15 seconds.

    Use as a context manager; call it with (done, total, note).

    Args:
        each_note: elsewhere, a plain line for every new note instead, but not within 2 seconds of the last.
    """

    def __init__(self, label: str, unit: str = "it", *, each_note: bool = False):
        self._tqdm = tqdm(desc=label, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True)
        self._label, self._each_note, self._note = label, each_note, ""
        self._last = time.monotonic()
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` is done; `note` stands behind the bar."""
        if self._first is None:  # the work may have begun long after the bar, and a resumed run far from 0
            self._first = (time.monotonic(), done)
            self._tqdm.initial = done
            if not self._tqdm.disable:
                self._tqdm.unpause()  # counts its rate from here
        self._tqdm.total = total
        self._tqdm.set_postfix_str(note, refresh=False)
        self._tqdm.n = done
        self._tqdm.refresh()
        if self._tqdm.disable and done and self._is_due(done, total, note):
            self._print(done, total, note)

    def _is_due(self, done: int, total: int, note: str) -> bool:
        since = time.monotonic() - self._last
        if not self._each_note:
            return since >= QUIET_LINE_EVERY_S
        return note != self._note and (not self._note or since >= NOTE_LINE_EVERY_S or done == total)

    def _print(self, done: int, total: int, note: str) -> None:
        self._last, self._note = time.monotonic(), note
        began, before = self._first or (self._last, done)
        left = f"{(self._last - began) / (done - before) * (total - done):.0f} s left" if before < done < total else ""
        print(f"{self._label}: " + ", ".join(filter(None, (f"{done}/{total}", left, note))), file=sys.stderr, flush=True)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tqdm.close()
