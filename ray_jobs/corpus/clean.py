"""Text as one writes it: Unicode NFC, plain spaces, whole words, no page furniture."""

import itertools
import re
import unicodedata
from collections import Counter

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff\x00-\x08\x0e-\x1f\x7f]")
_SPACES = re.compile(r"(?<=\S)[^\S\n]+")
_PAGE_NUMBER = re.compile(r"(?:(?:page|seite|p\.|s\.)\s*)?[-–—]?\s*\d{1,4}\s*[-–—]?(?:\s*(?:/|of|von)\s*\d{1,4})?", re.IGNORECASE)
_HYPHENATED = re.compile(r"(?<=[^\W\d_])-\n(?=[a-zà-öø-ÿ])")
_EDGE_LINES = 2
_REPEATED_SHARE = 0.5
_MIN_PAGES = 3
_FULL_LINE = 0.8


def normalise(text: str) -> str:
    """Return text in Unicode NFC, with Unix line ends, single spaces, at most one empty line, no invisible characters.

    Spaces at the start of a line stay: they carry meaning in lists and code.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n"))
    text = _INVISIBLE.sub("", text)
    lines = [_SPACES.sub(" ", line).rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def one_line(text: str) -> str:
    """Return normalised text as one line."""
    return " ".join(normalise(text).split())


def join_pages(pages: list[str]) -> tuple[str, int]:
    """Return the running text of pages, and how many lines of page furniture were dropped.

    Dropped are page numbers and the first and last lines that stand, digits aside, on more than half of the pages.
    Words hyphenated at a line end are joined, lines of a paragraph too.
    """
    lines_of = [[line.strip() for line in page.splitlines() if line.strip()] for page in pages]
    repeated = _repeated_edges(lines_of)
    kept = [_without_edges(lines, repeated) for lines in lines_of]
    dropped = sum(map(len, lines_of)) - sum(map(len, kept))
    text = "\n".join("\n".join(lines) for lines in kept)
    return _flow(_HYPHENATED.sub("", text)), dropped


def _repeated_edges(lines_of: list[list[str]]) -> set[str]:
    if len(lines_of) < _MIN_PAGES:
        return set()
    seen = Counter(key for lines in lines_of for key in {_key(line) for line in lines[:_EDGE_LINES] + lines[-_EDGE_LINES:]})
    return {key for key, count in seen.items() if count > _REPEATED_SHARE * len(lines_of)}


def _without_edges(lines: list[str], repeated: set[str]) -> list[str]:
    """Peel furniture off both ends; what stands behind the first line of text is text."""

    def peel(outer: list[str]) -> int:
        is_furniture = (_key(line) in repeated or _PAGE_NUMBER.fullmatch(line) for line in outer[:_EDGE_LINES])
        return len(list(itertools.takewhile(bool, is_furniture)))

    kept = lines[peel(lines) :]
    return kept[: len(kept) - peel(kept[::-1])]


def _key(line: str) -> str:
    return re.sub(r"\d+", "#", line.casefold())


def _flow(text: str) -> str:
    """Join lines to paragraphs; one ends with a sentence whose last line is short, as extracted PDFs keep no empty lines."""
    lines = text.split("\n")
    full = _FULL_LINE * max(map(len, lines), default=0)
    pieces = []
    for line in lines:
        ends = line.endswith((".", "!", "?", ":")) and len(line) < full
        pieces += [line, "\n\n" if ends else " "]
    return "".join(pieces)
