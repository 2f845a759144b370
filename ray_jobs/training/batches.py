"""Packed rows from Parquet, and the micro-batches of one optimizer step.

Shapes: B rows, T positions. Label t is the token at position t, so losses compare hidden[:, :-1] with labels[:, 1:].
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ray_jobs.core.errors import DataError

IGNORE = -100
_COLUMNS = ["input_ids", "labels", "segment_lengths"]


class Row(NamedTuple):
    """One packed row; position ids restart at each example in it, which keeps the examples apart in attention."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Batch:
    """A micro-batch; padding is a segment of its own with labels -100."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    labels_BT: Tensor

    @property
    def num_valid(self) -> int:
        """Positions that the loss counts."""
        return int((self.labels_BT[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        return Batch(self.input_ids_BT.to(device), self.position_ids_BT.to(device), self.labels_BT.to(device))


class PackedRows:
    """The packed rows of a folder of Parquet files, in the order of the file names.

    Args:
        folder: local folder with *.parquet of `input_ids`, `labels` and `segment_lengths`.

    Raises:
        DataError: there are no rows, or a column is missing.
    """

    def __init__(self, folder: str | Path):
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
        return Row(input_ids, np.concatenate([np.arange(n) for n in lengths]), labels)

    def drawn(self, index: int, *, epoch: int) -> Row:
        """Return a row as it is trained on in an epoch; rows that change with the epoch override this."""
        del epoch
        return self[index]


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


def collate(rows: list[Row]) -> Batch:
    """Return rows as one batch, padded at the right to the longest."""
    width = max(len(row.input_ids) for row in rows)
    input_ids, position_ids, labels = (
        torch.from_numpy(np.stack([_pad(np.asarray(getattr(row, name), np.int64), width, fill) for row in rows]))
        for name, fill in (("input_ids", 0), ("position_ids", None), ("labels", IGNORE))
    )
    return Batch(input_ids, position_ids, labels)


def _pad(values: np.ndarray, width: int, fill: int | None) -> np.ndarray:
    missing = width - len(values)
    tail = np.arange(missing) if fill is None else np.full(missing, fill)
    return np.concatenate([values, tail])


@functools.lru_cache(maxsize=4)
def _epoch_order(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _nothing_like(row: Row) -> Row:
    return row._replace(labels=np.full_like(row.labels, IGNORE))
