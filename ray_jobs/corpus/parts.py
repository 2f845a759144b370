"""Examples between reading and packing: Parquet parts, written whole by one worker and skipped when there already.

A unit is one input file, or one batch of chunks that a model writes pairs from. It leaves its parts, and a JSON file with
what it dropped as the last one, which makes the unit finished.
"""

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.core.storage import Storage
from ray_jobs.corpus.examples import Dropped, Example
from ray_jobs.corpus.template import Encoded

PART_ROWS = 1024
"""Examples of one part: what a worker holds in memory."""
_SCHEMA = pa.schema(
    {
        "kind": pa.string(),
        "example_id": pa.string(),
        "where": pa.string(),
        "source": pa.string(),
        "question_key": pa.string(),
        "signature": pa.binary(),
        "record": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "num_untrained": pa.int32(),
        "labels": pa.list_(pa.int32()),
        "segment_lengths": pa.list_(pa.int32()),
    }
)


def write_unit(storage: Storage, unit: str, found: Iterable[Example | Dropped]) -> None:
    """Write the parts of a unit as they fill, then its mark; memory stays that of one part."""
    dropped: list[Dropped] = []
    examples = _examples(found, dropped)
    num_parts = 0
    while rows := [_row(example) for example in itertools.islice(examples, PART_ROWS)]:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), buffer)
        storage.write_bytes(_part_name(unit, num_parts), buffer.getvalue())
        num_parts += 1
    storage.write_json(f"{unit}.json", {"num_parts": num_parts, "dropped": dropped})


def is_finished(storage: Storage, unit: str) -> bool:
    """Return whether a unit is whole."""
    return storage.exists(f"{unit}.json")


def part_names(storage: Storage, units: Iterable[str]) -> Iterator[str]:
    """Yield the parts of finished units, in order."""
    for unit in units:
        yield from (_part_name(unit, number) for number in range(storage.read_json(f"{unit}.json")["num_parts"]))


def dropped_of(storage: Storage, units: Iterable[str]) -> Iterator[Dropped]:
    """Yield what finished units dropped, in order."""
    for unit in units:
        yield from (Dropped(*row) for row in storage.read_json(f"{unit}.json")["dropped"])


def read_part(storage: Storage, part: str, columns: list[str]) -> pa.Table:
    """Return some columns of a part."""
    return pq.read_table(f"{storage.root}/{part}", columns=columns, filesystem=storage.fs)


def read_records(storage: Storage, part: str, rows: list[int]) -> list[dict[str, Any]]:
    """Return the records of some rows of a part: rows of chunks.parquet or pairs.jsonl."""
    return [json.loads(text) for text in read_part(storage, part, ["record"]).column("record").take(rows).to_pylist()]


def read_encoded(storage: Storage, part: str, rows: list[int]) -> list[tuple[str, str, Encoded]]:
    """Return (example_id, source, token ids) of some rows of a part."""
    table = read_part(storage, part, ["example_id", "source", *Encoded._fields]).take(rows)
    return [(row.pop("example_id"), row.pop("source"), Encoded(**row)) for row in table.to_pylist()]


def _part_name(unit: str, number: int) -> str:
    return f"{unit}-{number:06d}.parquet"


def _examples(found: Iterable[Example | Dropped], dropped: list[Dropped]) -> Iterator[Example]:
    for item in found:
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            yield item


def _row(example: Example) -> dict[str, Any]:
    fields = example._asdict()
    return {
        **{key: fields[key] for key in ("kind", "example_id", "where", "source", "question_key", "signature")},
        "record": json.dumps(example.record, ensure_ascii=False),
        **example.encoded._asdict(),
    }
