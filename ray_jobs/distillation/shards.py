"""Rows of bytes by key in shards on any storage: many writers without a lock, killed at any moment, damage found before use.

A shard is a file of safetensors with one tensor of bytes for each row and a checksum for each in its metadata. It appears whole
or not at all under a name of its own, and the index of a folder is what the headers of its shards say. So nothing has to be
kept in step with anything else.
"""

import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow.fs as pafs
from safetensors.numpy import save

from ray_jobs.core.progress import say
from ray_jobs.core.storage import Storage

FORMAT = "raystill targets 1"
FLUSH_BYTES = 32 * 2**20
FLUSH_S = 10.0
REFRESH_S = 5.0
"""Least time between two looks for shards of other writers."""
STALE_S = 3600.0
"""Age from which a file that was never finished is deleted."""
_HEAD_BYTES = 2**16
"""Read at once of a shard for its header."""
_READERS = 8
_NAME = re.compile(r"shard-[0-9a-f]{32}\.safetensors")


class _Place(NamedTuple):
    file: str
    start: int
    size: int
    checksum: str


class _Damaged(Exception):
    """A shard is not what was written."""


class _Foreign(Exception):
    """A file is no shard of this kind."""


class ShardStore:
    """Bytes by key, kept in a folder; what was flushed is there for every later process.

    Damaged shards are deleted with one line, and their rows are missing from then on; files of others are left alone.

    Args:
        folder: any number of processes may write to it.
        kind: what the rows are, written into each shard; shards of another kind are not read.
        budget_bytes: size of the folder from which nothing more is written.
        flush_bytes: what waits at most before it is written in the background; in seconds, FLUSH_S.
        refresh_s: least time between two looks for shards of other writers.
    """

    def __init__(self, folder: Storage, *, kind: str, budget_bytes: int, flush_bytes: int = FLUSH_BYTES, refresh_s: float = REFRESH_S):
        self._folder, self._kind, self._budget = folder, kind, budget_bytes
        self._flush_bytes, self._refresh_s = flush_bytes, refresh_s
        self._places: dict[str, _Place] = {}
        self._sizes: dict[str, int] = {}
        self._ignored: set[str] = set()
        self._waiting: dict[str, bytes] = {}
        self._being_written: list[tuple[dict[str, bytes], Future[None]]] = []
        self._writer = ThreadPoolExecutor(1, "shard-writer")
        self._first_waits_since = self._looked = 0.0
        self._stopped = False
        self._changing = threading.Lock()
        self._look()

    def __contains__(self, key: str) -> bool:
        return key in self._places or self._in_memory(key) is not None

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Size of all shards known here."""
        return sum(self._sizes.values())

    def refresh(self) -> None:
        """Look for shards that others wrote, if the last look was not just now."""
        if time.monotonic() - self._looked >= self._refresh_s:
            self._look()

    def read(self, key: str) -> bytes | None:
        """Return a row, or None where it is missing or turns out to be damaged; may be called from any thread."""
        held = self._in_memory(key)
        place = self._places.get(key)
        if held is not None or place is None:
            return held
        try:
            with self._folder.fs.open_input_file(f"{self._folder.root}/{place.file}") as file:
                data = file.read_at(place.size, place.start)
        except FileNotFoundError:  # another process found it damaged
            self._forget(place.file)
            return None
        if _checksum(key, data) != place.checksum:
            self._drop(place.file, "a row in it has another checksum than when it was written")
            return None
        return data

    def put(self, rows: Mapping[str, bytes]) -> None:
        """Take rows to keep; they can be read from now on, and are safe after the next flush."""
        if self._stopped:
            return
        self._first_waits_since = self._first_waits_since if self._waiting else time.monotonic()
        self._waiting.update(rows)
        if sum(map(len, self._waiting.values())) >= self._flush_bytes or time.monotonic() - self._first_waits_since >= FLUSH_S:
            self._start_writing()

    def flush(self) -> None:
        """Write all rows that were put, and wait until they are safe."""
        self._start_writing()
        for _, written in self._being_written:
            written.result()
        self._forget_written()

    def _start_writing(self) -> None:
        self._forget_written()
        rows, self._waiting = self._waiting, {}
        if rows and not self._stopped:
            self._being_written.append((rows, self._writer.submit(self._write, rows)))

    def _forget_written(self) -> None:
        done = [written for _, written in self._being_written if written.done()]
        self._being_written = [(rows, written) for rows, written in self._being_written if written not in done]
        for written in done:
            written.result()  # raises what is no OSError

    def _write(self, rows: dict[str, bytes]) -> None:
        data = _to_shard(rows, self._kind)
        if self.num_bytes + len(data) > self._budget:
            self._stop(f"it has {self.num_bytes} bytes, and cache.budget is {self._budget}")
            return
        file = f"shard-{uuid.uuid4().hex}.safetensors"
        try:
            self._folder.write_bytes(file, data)
        except OSError as error:  # StorageError is one
            self._stop(str(error))
            return
        self._add(file, len(data), _read_header(data, len(data), self._kind))

    def _stop(self, reason: str) -> None:
        if not self._stopped:
            self._stopped = True
            say(f"targets are no longer kept in {self._folder.uri} ({reason}); what is missing there is computed each time")

    def _look(self) -> None:
        """Read the headers of shards that are new, and forget those that are gone."""
        self._looked, known = time.monotonic(), set(self._sizes)  # before the listing, which lacks what is written meanwhile
        infos = self._folder.fs.get_file_info(pafs.FileSelector(self._folder.root, allow_not_found=True))
        found = {info.base_name: info for info in infos if info.is_file}
        for gone in known - found.keys():
            self._forget(gone)
        self._clean([info for name, info in found.items() if ".safetensors.tmp-" in name])
        new = [name for name in found if _NAME.fullmatch(name) and name not in self._sizes and name not in self._ignored]
        with ThreadPoolExecutor(_READERS) as readers:
            for name, header in zip(new, readers.map(lambda name: self._header(name, found[name].size), new), strict=True):
                if header is not None:
                    self._add(name, found[name].size, header)

    def _header(self, name: str, size: int) -> dict[str, _Place] | None:
        try:
            with self._folder.fs.open_input_file(f"{self._folder.root}/{name}") as file:
                head = file.read_at(min(size, _HEAD_BYTES), 0)
                missing = 8 + int.from_bytes(head[:8], "little") - len(head)
                if 0 < missing <= size - len(head):
                    head += file.read_at(missing, len(head))
            return _read_header(head, size, self._kind, name)
        except FileNotFoundError:
            return None
        except _Foreign as error:
            self._ignored.add(name)
            say(f"{self._folder.uri}/{name} is left alone: {error}")
        except _Damaged as error:
            self._drop(name, str(error))
        return None

    def _add(self, file: str, size: int, header: dict[str, _Place]) -> None:
        with self._changing:
            self._sizes[file] = size
            for key, place in header.items():
                self._places.setdefault(key, place._replace(file=file))

    def _drop(self, file: str, reason: str) -> None:
        if file not in self._ignored:
            self._ignored.add(file)
            say(f"{self._folder.uri}/{file} is damaged ({reason}): deleted, and what it held is computed again")
            self._folder.delete(file)
        self._forget(file)

    def _forget(self, file: str) -> None:
        with self._changing:
            self._sizes.pop(file, None)
            self._places = {key: place for key, place in self._places.items() if place.file != file}

    def _clean(self, unfinished: list[pafs.FileInfo]) -> None:
        for info in unfinished:
            if info.mtime is not None and time.time() - info.mtime.timestamp() > STALE_S:
                self._folder.delete(info.base_name)

    def _in_memory(self, key: str) -> bytes | None:
        for rows in (self._waiting, *(rows for rows, _ in self._being_written)):
            if key in rows:
                return rows[key]
        return None


def _to_shard(rows: Mapping[str, bytes], kind: str) -> bytes:
    sums = {key: _checksum(key, data) for key, data in rows.items()}
    tensors = {key: np.frombuffer(data, np.uint8) for key, data in rows.items()}
    return save(tensors, metadata={"format": FORMAT, "kind": kind, "checksums": json.dumps(sums)})


def _read_header(head: bytes, size: int, kind: str, file: str = "") -> dict[str, _Place]:
    """Return where the rows of a shard lie.

    Args:
        head: the shard's first bytes, its header among them.
        size: of the whole file.
    """
    length = int.from_bytes(head[:8], "little")
    try:
        header = json.loads(head[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        if metadata.get("format") != FORMAT or metadata.get("kind") != kind:
            raise _Foreign(f"it holds {metadata.get('format')!r} of {metadata.get('kind')!r}, not {FORMAT!r} of {kind!r}")
        sums = json.loads(metadata["checksums"])
        places = {
            key: _Place(file, 8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0], sums[key])
            for key, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _Damaged(f"its header cannot be read: {error}") from error
    end = max((place.start + place.size for place in places.values()), default=8 + length)
    if end != size:
        raise _Damaged(f"it has {size} bytes, and its header says {end}")
    return places


def _checksum(key: str, data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16, key=key.encode()[:64]).hexdigest()
