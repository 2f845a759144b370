"""Packed rows of the embedded course and of WikiText-2, to train on and held out."""

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.course_rows import LECTURES

HELD_OUT = 8
"""Of the course's rows, one in so many is held out."""


class TextRows(NamedTuple):
    """Folders of packed rows."""

    train: Path
    course: Path
    wikitext: Path


def write_text_rows(folder: Path, model: Path, *, wikitext: Path, length: int, num_train: int, num_eval: int) -> TextRows:
    """Write rows of `length` tokens, each one example; no held-out token is in a training row.

    The training rows are those of the course that are not held out, at most half of them, and WikiText-2's validation text;
    its test text is held out.

    Args:
        model: folder with the tokenizer.
        wikitext: folder with valid.txt and test.txt.
        num_train: training rows, or all that the texts have.
        num_eval: held-out rows of each text, at most.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lectures = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(LECTURES.glob("*.md")))
    texts = [lectures, *((wikitext / name).read_text(encoding="utf-8") for name in ("valid.txt", "test.txt"))]
    course, wiki, test = (cut(tokenizer(text)["input_ids"], length) for text in texts)
    taught = [row for place, row in enumerate(course) if place % HELD_OUT][: num_train // 2]
    train = [*taught, *wiki[: num_train - len(taught)]]
    found = TextRows(*(folder / name for name in TextRows._fields))
    for place, rows in zip(found, (train, course[::HELD_OUT][:num_eval], test[:num_eval]), strict=True):
        write(place, rows)
    return found


def cut(tokens: list[int], length: int) -> list[list[int]]:
    """Return all whole rows of a text."""
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


def write(folder: Path, rows: list[list[int]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: list[dict[str, Any]] = [{"input_ids": ids, "labels": [-100, *ids[1:]], "segment_lengths": [len(ids)]} for ids in rows]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "part-0.parquet")
