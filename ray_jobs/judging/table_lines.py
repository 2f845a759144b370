"""The rows of a CSV or JSONL file that another program or a person wrote, each with the place where it stands."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from ray_jobs.core.errors import DataError
from ray_jobs.judging.parse import UNREADABLE, well_formed

SEPARATORS = ",;\t"
"""Of a CSV file: a spreadsheet writes semicolons where the comma is the decimal sign, as in German."""


class Line(NamedTuple):
    """One row of a file, by lower-case column, and where it stands."""

    where: str
    values: dict[str, Any]

    def get(self, *names: str) -> str:
        """Return the first of these columns that is not empty, as text that can be written."""
        return next((text for name in names if (text := _text(self.values.get(name)))), "")

    def fail(self, what: str) -> DataError:
        """Return the error that says what is wrong with this row."""
        return DataError(f"{self.where}: {what}")


def read_lines(content: bytes, *, name: str) -> list[Line]:
    """Return the rows of a file.

    Args:
        content: the file's bytes, UTF-8.
        name: the file's: CSV where it ends in .csv, else JSONL.

    Raises:
        DataError: it is not UTF-8, no CSV, or a line of it is no JSON object.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 ({error}): save it as UTF-8") from None
    return list(_from_csv(text, name) if name.lower().endswith(".csv") else _from_jsonl(text, name))


def _from_csv(text: str, name: str) -> Iterator[Line]:
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=header.count))
    try:
        for row in reader:
            yield Line(f"{name} line {reader.line_num}", _lowered(row))
    except csv.Error as error:
        raise DataError(f"{name} after line {reader.line_num}: no CSV ({error}): close its quotes, and shorten what is longer") from None


def _from_jsonl(text: str, name: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield Line(f"{name} line {number}", _lowered(json.loads(line)))
            except UNREADABLE as error:
                raise DataError(f"{name} line {number}: no JSON object ({error}): give one object a line") from None


def _lowered(row: dict[str, Any]) -> dict[str, Any]:
    return {str(key).strip().lower(): value for key, value in row.items() if key is not None}


def _text(value: Any) -> str:
    return "" if value is None else well_formed(str(value).strip())
