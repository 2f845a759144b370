"""Packed rows and the micro-batches of a step."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from packed_rows import write_rows

from ray_jobs.core.errors import DataError
from ray_jobs.training.batches import IGNORE, NO_SOURCE, PackedRows, collate, eval_batches, join_rows, step_batches, step_rows


@pytest.fixture
def rows(tmp_path):
    return PackedRows(write_rows(tmp_path / "train", [(3, 2), (4,), (1, 1, 3), (5,), (2, 2), (3,), (6,)]))


def first_tokens(batches):
    counted = [batch for batch in batches]
    return sorted(int(ids[0]) for b in counted for ids, labels in zip(b.input_ids_BT, b.labels_BT, strict=True) if (labels != IGNORE).any())


def test_position_ids_restart_at_each_segment(rows):
    assert rows[0].position_ids.tolist() == [0, 1, 2, 0, 1]
    assert rows[2].position_ids.tolist() == [0, 0, 0, 1, 2]


def test_padding_is_a_segment_of_its_own_that_counts_nothing(rows):
    batch = collate([rows[1], rows[6]])
    assert batch.position_ids_BT[0].tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.labels_BT[0].tolist() == [IGNORE, 1001, 1002, 1003, IGNORE, IGNORE]
    assert batch.num_valid == 3 + 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_step_has_the_same_rows_for_any_workers_and_micro_batches(rows, world_size, micro_batch_size):
    for step in range(4):
        shares = [
            step_batches(rows, step=step, seed=7, global_batch_size=4, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert len({len(share) for share in shares}) == 1  # equally many, else workers would wait for each other for ever
        seen = first_tokens([batch for share in shares for batch in share])
        assert seen == sorted(1000 * i for i in step_rows(len(rows), step=step, seed=7, global_batch_size=4))


def test_each_epoch_sees_each_row_once_in_another_order(rows):
    drawn = [i for step in range(7) for i in step_rows(7, step=step, seed=0, global_batch_size=3)]
    epochs = [drawn[n : n + 7] for n in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_evaluation_sees_each_row_once_even_with_more_workers_than_rows(rows):
    for world_size in (1, 3, 9):
        shares = [list(eval_batches(rows, micro_batch_size=2, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert all(shares)
        assert first_tokens([batch for share in shares for batch in share]) == [1000 * i for i in range(7)]


def test_num_tokens_counts_rows(rows):
    assert rows.num_tokens([0, 6]) == 11


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="no packed rows"):
        PackedRows(tmp_path)


def test_a_missing_column_is_named(tmp_path):
    folder = write_rows(tmp_path / "train", [(3,)], columns=("input_ids", "labels"))
    with pytest.raises(DataError, match="segment_lengths"):
        PackedRows(folder)


def test_segments_that_do_not_sum_up_are_refused(tmp_path):
    row = {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3], "segment_lengths": [2]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="packed row 0"):
        PackedRows(tmp_path)[0]


def test_a_segments_source_goes_with_it_into_batches(tmp_path):
    folder = write_rows(tmp_path / "train", [(2, 3), (4,)], sources=[("b.md", "a.md"), ("b.md",)])
    assert PackedRows(folder)[0].sources is None and collate([PackedRows(folder)[0]]).sources_BT is None
    rows = PackedRows(folder, sources=["a.md", "b.md"])
    batch = collate([rows[0], rows[1]])
    assert batch.sources_BT.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, NO_SOURCE]]
    assert batch.to("cpu").rows([1]).sources_BT.tolist() == batch.sources_BT[1:].tolist()
    parts = [rows[0].cut(slice(0, 2)), rows[0].cut(slice(2, 5))]
    assert join_rows(parts).sources.tolist() == rows[0].sources.tolist()
    with pytest.raises(DataError, match=r"holds text from 'b\.md', which prepare's manifest does not list"):
        PackedRows(folder, sources=["a.md"])


def test_rows_without_sources_are_all_of_the_first(rows):
    old = PackedRows(rows.folder, sources=["everything"])
    assert old[2].sources.tolist() == [0] * 5
    assert PackedRows(rows.folder)[2].sources is None


def test_sources_are_read_over_several_files(tmp_path):
    for number, sources in enumerate(([("a",), ("b", "a")], [("b",), ("c", "c")])):
        part = write_rows(tmp_path / f"part{number}", [(2,), (1, 2)], sources=sources) / "part-0.parquet"
        part.rename(tmp_path / f"{number}.parquet")
    rows = PackedRows(tmp_path, sources=["a", "b", "c"])
    assert [rows[index].sources.tolist() for index in range(4)] == [[0, 0], [1, 0, 0], [1, 1], [2, 2, 2]]


def test_batches_are_int64(rows):
    assert collate([rows[0]]).input_ids_BT.dtype == torch.int64
