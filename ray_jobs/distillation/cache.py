"""Targets that are computed once: a cache around any teacher, filled as rows come, keyed by what was asked of whom.

Shapes: B rows, T positions, N valid positions, H width.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.distillation.identity import row_keys
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.targets import HiddenTarget, Target, Targets
from ray_jobs.distillation.topk import TopKCodec, TopKTarget, make_top_k
from ray_jobs.training.batches import IGNORE, Batch

_READERS = 4
_AHEAD = 2


class Kept(Protocol):
    """What is kept of a target, as bytes."""

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one valid position."""

    def make(self, target: HiddenTarget, labels_N: Tensor) -> bytes | None:
        """Return what is kept of one row's target; None where it would not be finite."""

    def join(self, rows: Sequence[bytes], head: Callable[[], Tensor], device: torch.device) -> Target:
        """Return the target of a batch from those of its rows."""


class KeptHidden(NamedTuple):
    """Final hidden states in a type: all of the teacher's logits follow from them."""

    width: int
    dtype: torch.dtype

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one valid position."""
        return self.width * self.dtype.itemsize

    def make(self, target: HiddenTarget, labels_N: Tensor) -> bytes | None:
        """Return what is kept of one row's target; None where it would not be finite."""
        states_NH = target.hidden_NH.to("cpu", self.dtype).contiguous()
        return states_NH.view(torch.uint8).numpy().tobytes() if states_NH.isfinite().all() else None

    def join(self, rows: Sequence[bytes], head: Callable[[], Tensor], device: torch.device) -> HiddenTarget:
        """Return the target of a batch from those of its rows, in the head's type."""
        flat = torch.frombuffer(bytearray().join(rows), dtype=self.dtype) if any(rows) else torch.empty(0, dtype=self.dtype)
        head_VH = head()
        return HiddenTarget(flat.view(-1, self.width).to(device).to(head_VH.dtype), head_VH)


class KeptTopK(NamedTuple):
    """The likeliest tokens, and the weight of all others."""

    codec: TopKCodec

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one valid position."""
        return self.codec.bytes_per_position

    def make(self, target: HiddenTarget, labels_N: Tensor) -> bytes | None:
        """Return what is kept of one row's target; None where it would not be finite."""
        head_VH = target.head_VH[: self.codec.vocabulary]  # rows beyond are padding
        found = make_top_k(target.hidden_NH, head_VH, labels_N, k=self.codec.k).to("cpu")
        return self.codec.encode(found) if found.log_p_NK.isfinite().all() else None

    def join(self, rows: Sequence[bytes], head: Callable[[], Tensor], device: torch.device) -> TopKTarget:
        """Return the target of a batch from those of its rows."""
        parts = [self.codec.decode(data) for data in rows or [b""]]
        return TopKTarget(*(torch.cat(columns) for columns in zip(*parts, strict=True))).to(device)


class CachedTargets:
    """Asks a teacher for rows that nobody asked for before, and reads the others.

    What it returns is what it keeps, also for rows just computed: a run's result does not depend on which rows were read.

    Args:
        inner: the teacher; gets only rows that are missing.
        store: where targets are kept, for this teacher and this kind alone.
        identity: of the teacher.
        kept: what is kept of a target.
        whose: the teacher, for messages.
        epoch_rows: rows of an epoch on this worker; the teacher is released after so many were read in a row.
    """

    def __init__(self, inner: Targets, store: ShardStore, *, identity: str, kept: Kept, epoch_rows: int, whose: str = "the teacher"):
        self._inner, self._store, self._identity, self._kept = inner, store, identity, kept
        self._epoch_rows, self._whose = epoch_rows, whose
        self._readers = ThreadPoolExecutor(_READERS, "target-reader")
        self._ahead: dict[str, Future[bytes | None]] = {}
        self._asked: set[str] = set()
        self._own_wait_s = 0.0
        self._computed = self._read = self._in_a_row = 0
        self._stays = False

    @property
    def top_k(self) -> int | None:
        """Tokens that are kept of a distribution; None where hidden states are."""
        return self._kept.codec.k if isinstance(self._kept, KeptTopK) else None

    @property
    def ahead(self) -> int:
        """Steps whose micro-batches it wants to know before it is asked for them."""
        return max(_AHEAD, self._inner.ahead)

    @property
    def waited_s(self) -> float:
        """Seconds in which `of` waited for storage, or for a teacher elsewhere."""
        return self._own_wait_s + self._inner.waited_s

    def head(self) -> Tensor:
        """Return the teacher's output embedding."""
        return self._inner.head()

    def unkept(self) -> Targets:
        """Return the teacher itself, for rows that never come again; it is then no longer released between them."""
        self._stays = True
        return self._inner

    def announce(self, batches: list[Batch]) -> None:
        """Start to read the rows that are kept, and pass on the others."""
        self._store.refresh()
        for batch in batches:
            keys = row_keys(self._identity, batch)
            missing = []
            for row, key in enumerate(keys):
                if key is None or key in self._ahead or key in self._asked:
                    continue
                if key in self._store:
                    self._ahead[key] = self._readers.submit(self._store.read, key)
                else:
                    self._asked.add(key)
                    missing.append(row)
            if missing:
                self._inner.announce([_rows_of(batch, missing)])

    def of(self, batch: Batch) -> Target:
        """Return the target at the batch's valid positions: read where it is kept, else computed and kept.

        Raises:
            TrainingFailed: what was computed is NaN or infinite; nothing of it is kept.
        """
        device = batch.input_ids_BT.device
        on_host = batch.to("cpu")
        keys = row_keys(self._identity, on_host)
        rows = {key: self._row(key) for key in keys if key is not None}
        missing = [row for row, key in enumerate(keys) if key is not None and rows[key] is None]
        self._count(num_read=sum(data is not None for data in rows.values()), num_computed=len(missing))
        if missing:
            computed = self._compute(batch, missing)
            fresh = {key: data for row, data in zip(missing, computed, strict=True) if (key := keys[row]) is not None}
            self._store.put(fresh)
            rows.update(fresh)
        self._asked.difference_update(rows)
        return self._kept.join([data for key in keys if key is not None and (data := rows[key])], self.head, device)

    def probe(self, batch: Batch) -> HiddenTarget | None:
        """Return final hidden states of a batch that is not trained on; None as long as all was read, so that no teacher starts for it."""
        return self._inner.probe(batch) if self._computed else None

    def flush(self) -> None:
        """Make safe what was computed so far."""
        self._store.flush()

    def release(self) -> None:
        """Free what the teacher can load again."""
        self._inner.release()

    def counts(self) -> dict[str, float]:
        """Return the rows computed and read on this worker since it began."""
        return {**self._inner.counts(), "targets_computed": self._computed, "targets_read": self._read}

    def facts(self) -> dict[str, float]:
        """Return the size of what is kept of this teacher, by all runs, and of each token in it."""
        self._store.flush()
        return {**self._inner.facts(), "cached_bytes": self._store.num_bytes, "bytes_per_token": self._kept.bytes_per_position}

    def _row(self, key: str) -> bytes | None:
        began = time.perf_counter()
        coming = self._ahead.pop(key, None)
        data = coming.result() if coming is not None else self._store.read(key)
        self._own_wait_s += time.perf_counter() - began
        return data

    def _compute(self, batch: Batch, missing: list[int]) -> list[bytes]:
        part = _rows_of(batch, missing)
        target = self._inner.of(part)
        if not isinstance(target, HiddenTarget):
            raise TypeError(f"a cache keeps hidden states or what follows from them, not {type(target).__name__}")
        labels_BT = part.labels_BT[:, 1:]
        sizes = (labels_BT != IGNORE).sum(1).tolist()
        labels = labels_BT[labels_BT != IGNORE].split(sizes)
        hidden = target.hidden_NH.split(sizes)
        made = [self._kept.make(HiddenTarget(rows_NH, target.head_VH), each) for rows_NH, each in zip(hidden, labels, strict=True)]
        broken = [row for row, data in enumerate(made) if data is None]
        if broken:
            begins = "; ".join(f"row {missing[row]} begins {part.input_ids_BT[row, :8].tolist()}" for row in broken)
            raise TrainingFailed(
                f"targets of {self._whose} are NaN or infinite, computed in {target.hidden_NH.dtype}, at {len(broken)} of {len(made)} rows "
                f'of a micro-batch (token ids: {begins}); none of these rows is kept. Use distill.dtype = "float32", and '
                'distill.cache.dtype = "float32" where float16 is too narrow for what is kept; else look for such numbers in its weights'
            )
        return [data for data in made if data is not None]

    def _count(self, *, num_read: int, num_computed: int) -> None:
        self._read += num_read
        self._computed += num_computed
        never = not self._computed
        self._in_a_row = 0 if num_computed else self._in_a_row + num_read
        if not self._stays and self._in_a_row and (never or self._in_a_row >= self._epoch_rows):
            self._inner.release()


def _rows_of(batch: Batch, rows: list[int]) -> Batch:
    return batch if len(rows) == len(batch.input_ids_BT) else batch.rows(rows)
