"""The files that prepare leaves: packed rows, chunks, pairs; each written part by part."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.core.storage import Storage
from ray_jobs.corpus.packing import IGNORE, pack, packed_row
from ray_jobs.corpus.parts import read_encoded, read_records
from ray_jobs.corpus.selection import Shard

_INTS = pa.list_(pa.int32())
PACKED_SCHEMA = pa.schema({"row_id": pa.string(), "input_ids": _INTS, "labels": _INTS, "segment_lengths": _INTS})
CHUNK_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("chunk_id", "document", "heading", "text"), pa.string()),
        "num_tokens": pa.int32(),
        "language": pa.string(),
    }
)


def write_shard(parts: Storage, target: Storage, shard: Shard, *, max_length: int) -> dict[str, int]:
    """Pack one shard's examples, write its file, and return how many rows, tokens and labels are in it."""
    examples = [example for part, rows in shard.picks for example in read_encoded(parts, part, rows)]
    groups = pack([len(encoded.input_ids) for _, encoded in examples], max_length)
    rows = [packed_row([examples[i][0] for i in group], [examples[i][1] for i in group]) for group in groups]
    with pa.BufferOutputStream() as buffer:
        pq.write_table(pa.Table.from_pylist(rows, PACKED_SCHEMA), buffer)
        target.write_bytes(f"{shard.split}/{shard.number:06d}.parquet", buffer.getvalue().to_pybytes())
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "label_tokens": sum(label != IGNORE for row in rows for label in row["labels"]),
    }


def write_chunks(parts: Storage, target: Storage, picked: Iterable[tuple[str, list[int]]]) -> None:
    """Write chunks.parquet, one row group a part."""
    temporary = f"{target.root}/chunks.parquet.tmp"
    with pq.ParquetWriter(temporary, CHUNK_SCHEMA, filesystem=target.fs) as writer:
        for part, rows in picked:
            writer.write_table(pa.Table.from_pylist(read_records(parts, part, rows), CHUNK_SCHEMA))
    target.fs.move(temporary, f"{target.root}/chunks.parquet")


def write_lines(parts: Storage, target: Storage, name: str, picked: Iterable[tuple[str, list[int]]]) -> None:
    """Write pairs.jsonl or texts.jsonl."""
    temporary = f"{target.root}/{name}.tmp"
    with target.fs.open_output_stream(temporary) as stream:
        for line in _lines(record for part, rows in picked for record in read_records(parts, part, rows)):
            stream.write(line)
    target.fs.move(temporary, f"{target.root}/{name}")


def _lines(records: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    return ((json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records)
