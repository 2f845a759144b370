"""CSV whose texts no spreadsheet takes for formulas, and a program reads back as they were.

Source: OWASP, CSV Injection: a cell that begins with one of FORMULA gets an apostrophe before it.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

FORMULA = "=+-@\t\r\n＝＋－＠"
_GUARDED = re.compile(f"'*[{re.escape(FORMULA)}]")
"""A text that already has such an apostrophe gets another one: reading back drops one, whatever was there."""


def write_csv(columns: list[str], rows: Iterable[dict[str, Any]]) -> bytes:
    """Return rows as CSV (RFC 4180, UTF-8); numbers stand as they are, and keys beside the columns are left out."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: guard(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows)
    return buffer.getvalue().encode()


def read_csv(content: bytes) -> Iterator[dict[str, str]]:
    """Yield the rows of a file that `write_csv` wrote, all cells as text."""
    for row in csv.DictReader(io.StringIO(content.decode(), newline="")):
        yield {key: unguard(value) for key, value in row.items()}


def guard(text: str) -> str:
    """Return the text as a cell: -5 Grad -> '-5 Grad."""
    return f"'{text}" if _GUARDED.match(text) else text


def unguard(cell: str) -> str:
    """Return the text of a cell that `guard` made."""
    return cell[1:] if cell.startswith("'") and _GUARDED.match(cell) else cell
