"""Packed rows of the embedded course, made without Ray: the same bytes for every contestant of a benchmark."""

from pathlib import Path
from typing import Any

LECTURES = Path(__file__).parents[1] / "ray_jobs" / "datasets" / "os_course" / "lectures"
SHORTEST, LONGEST = 40, 200


def write_course_rows(folder: Path, model: Path, *, num_rows: int, length: int, seed: int = 0) -> Path:
    """Write rows of exactly `length` tokens as prepare does: examples of 40 to 200 tokens, the first token of each without a label.

    Args:
        folder: gets train/part-0.parquet.
        model: folder with the tokenizer.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(LECTURES.glob("*.md")))
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(num_rows):
        start = (number * length) % (len(tokens) - length)
        lengths = _segments(length, draw)
        ids = tokens[start : start + length]
        starts = set(np.cumsum([0, *lengths]).tolist())
        labels = [-100 if place in starts else token for place, token in enumerate(ids)]
        rows.append({"row_id": str(number), "input_ids": ids, "labels": labels, "segment_lengths": lengths})
    (folder / "train").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train" / "part-0.parquet")
    return folder / "train"


def _segments(length: int, draw: Any) -> list[int]:
    found: list[int] = []
    while (left := length - sum(found)) > LONGEST:
        found.append(int(draw.integers(SHORTEST, min(LONGEST, left - SHORTEST) + 1)))
    return [*found, left]
