"""Packed rows as `prepare` writes them, small and made up."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.training.batches import IGNORE


def write_rows(folder, segments, columns=("input_ids", "labels", "segment_lengths"), sources=None):
    """Write one packed row for each list of segment lengths; row i holds tokens 1000 i, 1000 i + 1, ... and may name sources."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, lengths in enumerate(segments):
        tokens = list(range(1000 * i, 1000 * i + sum(lengths)))
        starts = set(itertools.accumulate(lengths, initial=0))
        labels = [IGNORE if place in starts else token for place, token in enumerate(tokens)]
        row = {"row_id": str(i), "input_ids": tokens, "labels": labels, "segment_lengths": list(lengths)}
        rows.append({key: row[key] for key in ("row_id", *columns)} | ({"segment_sources": list(sources[i])} if sources else {}))
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-0.parquet")
    return folder
