"""Packed rows from Parquet, and the micro-batches of one optimizer step.

Shapes: B rows, T positions. Label t is the token at position t, so losses compare hidden[:, :-1] with labels[:, 1:].
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ray_jobs.core.errors import DataError

IGNORE = -100
NO_SOURCE = -1
"""Source of padding."""
_COLUMNS = ["input_ids", "labels", "segment_lengths"]
_SOURCES = "segment_sources"


class Row(NamedTuple):
    """One packed row; position ids restart at each example in it, which keeps the examples apart in attention."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    sources: np.ndarray | None = None
    """Index of the source of each token, where sources are told apart."""

    def cut(self, at: slice | np.ndarray) -> "Row":
        """Return some positions of the row."""
        return Row(*(None if column is None else column[at] for column in self))


@dataclass(frozen=True)
class Batch:
    """A micro-batch; padding is a segment of its own with labels -100."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    labels_BT: Tensor
    sources_BT: Tensor | None = None
    """Index of the source of each token, where sources are told apart; NO_SOURCE in padding."""

    @property
    def num_valid(self) -> int:
        """Positions that the loss counts."""
        return int((self.labels_BT[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(None if column is None else column.to(device) for column in self.columns))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors, in the order of the fields."""
        return self.input_ids_BT, self.position_ids_BT, self.labels_BT, self.sources_BT

    def rows(self, chosen: list[int]) -> "Batch":
        """Return some rows of the batch."""
        return Batch(*(None if column is None else column[chosen] for column in self.columns))


class PackedRows:
    """The packed rows of a folder of Parquet files, in the order of the file names.

    Args:
        folder: local folder with *.parquet of `input_ids`, `labels`, `segment_lengths` and, where sources are asked for,
            `segment_sources`; without that column all rows are of the first.
        sources: names of all sources, whose places in this order the rows then hold; none leaves sources out.

    Raises:
        DataError: there are no rows, a column is missing, or a source has another name.
    """

    def __init__(self, folder: str | Path, *, sources: Sequence[str] = ()):
        self.folder = str(folder)
        files = sorted(Path(folder).glob("*.parquet"))
        if not files:
            raise DataError(f"no packed rows in {folder}: it has no *.parquet; run `raystill prepare` again")
        missing = sorted(set(_COLUMNS) - set(pq.read_schema(files[0]).names))
        if missing:
            raise DataError(f"packed rows in {folder} have no column {missing}: run `raystill prepare` again")
        self._table = pq.read_table(files, columns=_COLUMNS)
        self._lengths = pc.list_value_length(self._table.column("input_ids")).to_numpy()
        if not len(self):
            raise DataError(f"packed rows in {folder}: the table is empty; run `raystill prepare` again with more text")
        self._sources = _SegmentSources(files, sources) if sources else None

    def __len__(self) -> int:
        return self._table.num_rows

    def num_tokens(self, indices: list[int]) -> int:
        """Return the tokens of some rows."""
        return int(sum(self._lengths[indices]))

    def __getitem__(self, index: int) -> Row:
        columns = [self._table.column(name)[index].values.to_numpy() for name in _COLUMNS]
        input_ids, labels, lengths = columns
        if not len(input_ids) == len(labels) == lengths.sum():
            raise DataError(
                f"packed row {index} of {self.folder}: {len(input_ids)} tokens, {len(labels)} labels, segments of {lengths.sum()}; "
                "they must be equal"
            )
        sources = None if self._sources is None else np.repeat(self._sources.of(index, len(lengths)), lengths)
        return Row(input_ids, np.concatenate([np.arange(n) for n in lengths]), labels, sources)

    def drawn(self, index: int, *, epoch: int) -> Row:
        """Return a row as it is trained on in an epoch; rows that change with the epoch override this."""
        del epoch
        return self[index]


class _SegmentSources:
    """The places of all segments' sources in a list of names; all are the first where the files have no such column."""

    def __init__(self, files: list[Path], names: Sequence[str]):
        self._places: np.ndarray | None = None
        if _SOURCES not in pq.read_schema(files[0]).names:
            return
        column = pq.read_table(files, columns=[_SOURCES]).column(_SOURCES).combine_chunks()
        found = column.flatten()
        places = pc.index_in(found, pa.array(names, pa.string()))
        if places.null_count:
            unknown = found.filter(places.is_null())[0].as_py()
            raise DataError(
                f"{files[0].parent} holds text from {unknown!r}, which prepare's manifest does not list: run `raystill prepare` again"
            )
        self._places, self._starts = places.to_numpy(), column.offsets.to_numpy() - column.offsets[0].as_py()

    def of(self, row: int, num_segments: int) -> np.ndarray:
        """Return the places of one row's segments."""
        if self._places is None:
            return np.zeros(num_segments, np.int64)
        return self._places[self._starts[row] : self._starts[row + 1]]


def step_rows(num_rows: int, *, step: int, seed: int, global_batch_size: int) -> list[int]:
    """Return the indices of the rows of an optimizer step.

    Rows are drawn from an endless sequence of epochs, each shuffled by (seed, epoch); step s (from 0) takes the s-th
    `global_batch_size` of them. So they depend on neither the number of workers nor the steps before.
    """
    places = range(step * global_batch_size, (step + 1) * global_batch_size)
    return [int(_epoch_order(num_rows, place // num_rows, seed)[place % num_rows]) for place in places]


def step_batches(
    rows: PackedRows, *, step: int, seed: int, global_batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """Return one worker's micro-batches of an optimizer step.

    All workers get equally many micro-batches; what is missing is filled with rows that count nothing.
    """
    chosen = step_rows(len(rows), step=step, seed=seed, global_batch_size=global_batch_size)
    share = -(-len(chosen) // world_size)
    places = range(step * global_batch_size, (step + 1) * global_batch_size)[rank::world_size]
    real = [rows.drawn(i, epoch=place // len(rows)) for i, place in zip(chosen[rank::world_size], places, strict=True)]
    filled = real + [_nothing_like(rows[chosen[0]])] * (share - len(real))
    return [collate(filled[start : start + micro_batch_size]) for start in range(0, share, micro_batch_size)]


def eval_batches(rows: PackedRows, *, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield one worker's share of all rows, each row once over all workers.

    All workers get equally many micro-batches, because sharded models are gathered by all together; what is missing
    is filled with rows that count nothing.
    """
    share = -(-len(rows) // world_size)
    mine = range(rank, len(rows), world_size)
    for start in range(0, share, micro_batch_size):
        real = [rows[i] for i in mine[start : start + micro_batch_size]]
        missing = min(micro_batch_size, share - start) - len(real)
        yield collate(real + [_nothing_like(rows[0])] * missing)


def join_rows(rows: list[Row]) -> Row:
    """Return rows one behind the other as one."""
    return Row(*(None if columns[0] is None else np.concatenate(columns) for columns in zip(*rows, strict=True)))


def collate(rows: list[Row]) -> Batch:
    """Return rows as one batch, padded at the right to the longest."""
    width = max(len(row.input_ids) for row in rows)
    fills = {"input_ids": 0, "position_ids": None, "labels": IGNORE, **({} if rows[0].sources is None else {"sources": NO_SOURCE})}
    columns = (np.stack([_pad(np.asarray(getattr(row, name), np.int64), width, fill) for row in rows]) for name, fill in fills.items())
    return Batch(*map(torch.from_numpy, columns))


def _pad(values: np.ndarray, width: int, fill: int | None) -> np.ndarray:
    missing = width - len(values)
    tail = np.arange(missing) if fill is None else np.full(missing, fill)
    return np.concatenate([values, tail])


@functools.lru_cache(maxsize=4)
def _epoch_order(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _nothing_like(row: Row) -> Row:
    return row._replace(labels=np.full_like(row.labels, IGNORE))
