"""Readers of question/answer rows and of plain texts: JSONL, CSV and Parquet, one row in memory at a time."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.core.errors import DataError
from ray_jobs.core.records import Pair, Question, Text, content_id
from ray_jobs.corpus.clean import normalise, one_line
from ray_jobs.corpus.files import InputFile
from ray_jobs.corpus.language import detect_language

_BATCH_ROWS = 1024


class Row(NamedTuple):
    """One row of a file: its values, or why it cannot be read."""

    where: str
    values: dict[str, Any] | None
    error: str = ""


def read_rows(file: InputFile) -> Iterator[Row]:
    """Yield the rows of a file; a broken one comes with its error.

    Raises:
        DataError: the file as a whole cannot be read as what its suffix says.
    """
    with file.open() as stream:
        for number, values, error in READERS[file.suffix](stream):
            yield Row(f"{file.name} {'row' if file.suffix == '.parquet' else 'line'} {number}", values, error)


def parse_pair(row: Row) -> Pair:
    """Return the training pair of a row with `question` and `answer`.

    Raises:
        DataError: one of them is missing or empty, or the row is broken.
    """
    question, answer = one_line(_text(row, "question")), normalise(_text(row, "answer"))
    return Pair(
        pair_id=_optional(row, "pair_id") or content_id(question, answer),
        question=question,
        answer=answer,
        topic=_optional(row, "topic"),
        language=_optional(row, "language") or detect_language(f"{question} {answer}"),
        source=_optional(row, "source") or row.where,
    )


def parse_question(row: Row) -> Question:
    """Return the evaluation question of a row with `question` and its sample answer, `reference`.

    Raises:
        DataError: one of them is missing or empty, or the row is broken.
    """
    question, reference = one_line(_text(row, "question")), normalise(_text(row, "reference"))
    return Question(
        question_id=_optional(row, "question_id") or content_id(question),
        question=question,
        reference=reference,
        topic=_optional(row, "topic"),
        language=_optional(row, "language") or detect_language(f"{question} {reference}"),
    )


def parse_text(row: Row) -> Text:
    """Return the text of a row with `text` and, where it has one, `label`.

    Raises:
        DataError: the text is missing or empty, or the row is broken.
    """
    text, label = normalise(_text(row, "text")), _optional(row, "label")
    return Text(text_id=_optional(row, "text_id") or content_id(text), text=text, label=label, source=_optional(row, "source") or row.where)


def read_questions(file: InputFile) -> list[Question]:
    """Return all evaluation questions of a file, which must be whole: a judge needs each of them.

    Raises:
        DataError: a row is broken, has no question or sample answer, or repeats an id; or there is none.
    """
    questions: dict[str, Question] = {}
    for row in read_rows(file):
        question = parse_question(row)
        if question.question_id in questions:
            raise DataError(f"{row.where}: question_id {question.question_id!r} stands twice ({question.question[:60]!r}); make ids unique")
        questions[question.question_id] = question
    if not questions:
        raise DataError(f"questions {file.name!r}: no row in it; give at least one row with `question` and `reference`")
    return list(questions.values())


def _text(row: Row, key: str) -> str:
    if row.values is None:
        raise DataError(f"{row.where}: {row.error}")
    value = row.values.get(key)
    if not isinstance(value, str) or not value.strip():
        seen = f"is {value!r}" if key in row.values else f"is missing (keys: {', '.join(map(str, row.values))})"
        raise DataError(f"{row.where}: `{key}` {seen}; every row needs text there")
    return value


def _optional(row: Row, key: str) -> str:
    value = (row.values or {}).get(key)
    return one_line(str(value)) if value is not None else ""


_Numbered = Iterator[tuple[int, dict[str, Any] | None, str]]


def _read_jsonl(stream: Any) -> _Numbered:
    for number, line in enumerate(io.BufferedReader(stream), start=1):
        if not line.strip():
            continue
        yield number, *_parse_line(line)


def _parse_line(line: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        return None, f"not JSON ({error})"
    except RecursionError:
        return None, "JSON nested too deeply"
    if not isinstance(values, dict):
        return None, f"a JSON {type(values).__name__}, not an object"
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return None, f"not Unicode text ({error.object[error.start]!a} is half a character)"
    except RecursionError:
        return None, "JSON nested too deeply"
    return values, ""


def _read_csv(stream: Any) -> _Numbered:
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=""), strict=True)
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, None, f"not CSV ({error})"
            continue
        if values is None:
            return
        yield reader.line_num, *_check_csv(values)


def _check_csv(values: dict[str | None, Any]) -> tuple[dict[str, Any] | None, str]:
    if None in values:
        return None, f"{len(values[None])} fields more than the header has"
    if any("\ufffd" in value for value in values.values() if value):
        return None, "not UTF-8 text"
    return {str(key): value for key, value in values.items()}, ""


def _read_parquet(stream: Any) -> _Numbered:
    try:
        batches = pq.ParquetFile(stream).iter_batches(_BATCH_ROWS)
        for start, batch in enumerate(batches):
            yield from ((start * _BATCH_ROWS + i, values, "") for i, values in enumerate(batch.to_pylist(), start=1))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {error}") from None


READERS: dict[str, Callable[[Any], _Numbered]] = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
"""Reader of each suffix; each yields (number, values or None, error)."""
