"""The files that prepare leaves: packed rows, chunks, pairs; each written part by part."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.core.storage import Storage
from ray_jobs.corpus.packing import IGNORE, labels, pack, packed_row
from ray_jobs.corpus.parts import read_encoded, read_records
from ray_jobs.corpus.selection import Shard
from ray_jobs.corpus.template import Encoded

_INTS = pa.list_(pa.int32())
PACKED_SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "input_ids": _INTS,
        "labels": _INTS,
        "segment_lengths": _INTS,
        "segment_sources": pa.list_(pa.string()),
    }
)
_IN_MANIFEST = {"rows": "train_rows", "tokens": "train_tokens", "label_tokens": "label_tokens"}
CHUNK_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("chunk_id", "document", "heading", "text"), pa.string()),
        "num_tokens": pa.int32(),
        "language": pa.string(),
    }
)


def write_shard(parts: Storage, target: Storage, shard: Shard, *, max_length: int) -> dict[str, Any]:
    """Pack one shard's examples, write its file, and return how many rows, tokens and labels are in it.

    Returns:
        `rows`, `tokens`, `label_tokens`, and `sources`: the same of each source by name, where `rows` are those that hold some of it.
    """
    examples = [example for part, rows in shard.picks for example in read_encoded(parts, part, rows)]
    groups = pack([len(encoded.input_ids) for *_, encoded in examples], max_length)
    rows = [_packed([examples[i] for i in group]) for group in groups]
    with pa.BufferOutputStream() as buffer:
        pq.write_table(pa.Table.from_pylist(rows, PACKED_SCHEMA), buffer)
        target.write_bytes(f"{shard.split}/{shard.number:06d}.parquet", buffer.getvalue().to_pybytes())
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "label_tokens": sum(label != IGNORE for row in rows for label in row["labels"]),
        "sources": _by_source([[examples[i] for i in group] for group in groups]),
    }


def _packed(examples: list[tuple[str, str, Encoded]]) -> dict[str, Any]:
    ids, sources, encoded = zip(*examples, strict=True)
    return packed_row(list(ids), list(encoded), sources=sources)


def _by_source(rows: list[list[tuple[str, str, Encoded]]]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for examples in rows:
        for source in {source for _, source, _ in examples}:
            counts.setdefault(source, Counter())["rows"] += 1
        for _, source, encoded in examples:
            trained = sum(label != IGNORE for label in labels(encoded))
            counts[source].update(tokens=len(encoded.input_ids), label_tokens=trained)
    return counts


class Packed:
    """Adds up what the shards hold: rows, tokens and labels of each split, and of each source."""

    def __init__(self) -> None:
        self.splits: dict[str, Counter[str]] = {"train": Counter(), "eval": Counter()}
        self._sources: dict[str, Counter[str]] = {}

    @property
    def listed(self) -> dict[str, dict[str, int]]:
        """The sources by name: train_rows, train_tokens, label_tokens and eval_label_tokens of each, as the manifest has them."""
        fields = (*_IN_MANIFEST.values(), "eval_label_tokens")
        return {name: {field: self._sources[name][field] for field in fields} for name in sorted(self._sources)}

    def add(self, split: str, shard: dict[str, Any]) -> None:
        """Add what `write_shard` returned."""
        self.splits[split].update({name: shard[name] for name in _IN_MANIFEST})
        for source, counts in shard["sources"].items():
            names = _IN_MANIFEST if split == "train" else {"label_tokens": "eval_label_tokens"}
            self._sources.setdefault(source, Counter()).update({name: counts[key] for key, name in names.items()})


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
