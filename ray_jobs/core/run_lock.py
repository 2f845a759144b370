"""One process at a time works on a stage: a small file beside the stage's folder names it, and dies with it.

STORAGE/NAME/STAGE.lock says who holds the stage and is renewed for as long as it works. On the holder's own machine its
death is seen at once, so a killed job starts again immediately; from another machine it is seen when the file is STALE_S old.
Where the filesystem has locks, two starts in the same instant are kept apart by one; elsewhere (an object store) each start
reads the file again after SETTLE_S, and the one whose name is not in it gives way.
"""

import _thread
import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from ray_jobs.core.errors import StageHeld
from ray_jobs.core.progress import say
from ray_jobs.core.storage import Storage

RENEW_S = 15.0
STALE_S = 120.0
SETTLE_S = 1.0
CLOCK_S = 60.0
"""A process of the same id is another one where its start differs by more; start times move when the clock is set."""


class RunLock:
    """The hold of this process on one stage: until `release`, until nothing refers to it any more, or until the process ends.

    Args:
        run: the run's folder.
        stage: the stage's name.

    Raises:
        StageHeld: another live process holds it; says which, where, and since when.
    """

    def __init__(self, run: Storage, stage: str):
        self._run, self._stage, self._name = run, stage, f"{stage}.lock"
        self._own = {**_who_this_is(), "since": time.time(), "token": uuid.uuid4().hex}
        self._ended, self._turn = threading.Event(), threading.Lock()
        with _guard(run) as guarded:
            self._refuse_other(_read(run, self._name))
            self._write()
        if not guarded:
            time.sleep(SETTLE_S)
            self._refuse_other(_read(run, self._name))
        self._finalizer = weakref.finalize(self, _release, run, self._name, self._own, self._ended, self._turn)
        threading.Thread(target=_renew, args=(weakref.ref(self), self._ended), name=f"lock-{stage}", daemon=True).start()

    def release(self) -> None:
        """Let others work on the stage."""
        self._finalizer()

    def check(self) -> None:
        """Make sure that no other process has taken the stage over.

        Raises:
            StageHeld: one has, as this process showed no sign of life for STALE_S.
        """
        held = _read(self._run, self._name)
        if held is not None and not _is_own_process(held):
            raise StageHeld(f"stage {self._stage!r} of {self._run.uri} was taken over by {_words(held)}, as this process stood still")

    def renew(self) -> None:
        """Show that this process lives; nothing to do where it has released the stage, or begun it again.

        Raises:
            StageHeld: as `check`.
        """
        with self._turn, _guard(self._run):
            self.check()
            held = _read(self._run, self._name)
            if held is not None and held["token"] == self._own["token"]:
                self._write()

    def _write(self) -> None:
        self._run.write_json(self._name, {**self._own, "renewed": time.time()})

    def _refuse_other(self, held: dict[str, Any] | None) -> None:
        if held is None or held["token"] == self._own["token"] or not _lives(held):
            return
        raise StageHeld(
            f"stage {self._stage!r} of {self._run.uri} is worked on by {_words(held)}: wait for it, stop it, or use another [run] name"
        )


def _who_this_is() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "user": psutil.Process().username(),
    }


def _machine() -> str:
    """Return what is equal only for processes that see each other's ids: this boot of this machine, or of this container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _lives(held: dict[str, Any]) -> bool:
    if held["machine"] != _machine():
        return time.time() - held["renewed"] < STALE_S
    if _is_own_process(held):
        return False  # what this process began and left, by an error that its caller caught
    try:
        process = psutil.Process(held["pid"])
        return abs(process.create_time() - held["started"]) < CLOCK_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_own_process(held: dict[str, Any]) -> bool:
    return held["machine"] == _machine() and held["pid"] == os.getpid()


def _words(held: dict[str, Any]) -> str:
    since, renewed = (datetime.fromtimestamp(held[key]).strftime("%Y-%m-%d %H:%M:%S") for key in ("since", "renewed"))
    who = f"process {held['pid']} of {held['user']} on {held['host']} since {since}"
    return who if held["machine"] == _machine() else f"{who} (last sign of it {renewed}; free {STALE_S:.0f} s after that)"


def _read(run: Storage, name: str) -> dict[str, Any] | None:
    try:
        return run.read_json(name)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _guard(run: Storage) -> Iterator[bool]:
    """Keep others out while the file is read and written; yields False where the filesystem has no locks."""
    if not run.is_local:
        yield False
        return
    folder = os.open(run.root, os.O_RDONLY)
    try:
        yield _locked(folder)
    finally:
        os.close(folder)


def _locked(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # on the folder itself: leaves no file behind
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _release(run: Storage, name: str, own: dict[str, Any], ended: threading.Event, turn: threading.Lock) -> None:
    if own["pid"] != os.getpid():
        return  # a forked child has a copy of this object, and must not end its parent's hold
    ended.set()
    with turn:
        held = _read(run, name)
        if held is not None and held["token"] == own["token"]:
            run.delete(name)


def _renew(lock: "weakref.ref[RunLock]", ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        alive = lock()
        if alive is None:
            return
        try:
            alive.renew()
        except StageHeld as error:
            say(f"stopping: {error}")
            _thread.interrupt_main()
            return
        except OSError as error:
            say(f"cannot renew the hold on {alive._stage}: {error}")
        del alive
