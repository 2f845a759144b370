"""Markdown to chunks: cut at headings first, then paragraphs, sentences and words, as the token budget asks."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

Count = Callable[[str], int]
"""Tokens of a text."""
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*")
_FENCE = re.compile(r"\s*(```|~~~)")
_CUTS = (("\n\n", r"\n\n+"), ("\n", r"\n"), (" ", r"(?<=[.!?;:])\s+"), (" ", r"\s+"))
"""What a text is cut at, coarse to fine: (what joins the pieces again, where to cut)."""


class Chunk(NamedTuple):
    """A piece of one section; `heading` is the path of headings above it."""

    heading: str
    text: str


def cut_chunks(markdown: str, *, budget: int, count: Count) -> Iterator[Chunk]:
    """Yield a document's chunks in order; none crosses a heading, and none with its heading passes the budget.

    Args:
        budget: tokens of one chunk with its heading.
        count: tokens of a text as it will be trained.
    """
    for path, body in split_sections(markdown):
        heading = path if count(path) <= budget // 2 else ""
        for text in _cut(body, lambda text, heading=heading: count(chunk_text(heading, text)) <= budget):
            yield Chunk(heading, text)


def chunk_text(heading: str, text: str) -> str:
    """Return a chunk as it is trained: its heading, then its text."""
    return f"{heading}\n\n{text}" if heading else text


def split_sections(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield (path of headings, body) of each section that has a body; `#` in fenced code is no heading."""
    path: dict[int, str] = {}
    body: list[str] = []
    in_code = False
    for line in markdown.split("\n"):
        in_code ^= bool(_FENCE.match(line))
        heading = None if in_code else _HEADING.fullmatch(line)
        if heading is None:
            body.append(line)
            continue
        yield from _section(path, body)
        level = len(heading[1])
        path = {depth: title for depth, title in path.items() if depth < level} | {level: heading[2]}
        body = []
    yield from _section(path, body)


def _section(path: dict[int, str], body: list[str]) -> Iterator[tuple[str, str]]:
    text = "\n".join(body).strip()
    if re.search(r"\w", text):
        yield " > ".join(path.values()), text


def _cut(text: str, fits: Callable[[str], bool], level: int = 0) -> Iterator[str]:
    """Yield the text in as few pieces as fit, filled in order; a piece that alone is too long is cut finer."""
    if fits(text):
        yield text
    elif level == len(_CUTS):
        yield from _cut_blindly(text, fits)
    else:
        joint, pattern = _CUTS[level]
        held = ""
        for piece in re.split(pattern, text):
            longer = f"{held}{joint}{piece}" if held else piece
            if fits(longer):
                held = longer
                continue
            if held:
                yield held
            *full, held = _cut(piece, fits, level + 1)
            yield from full
        if held:
            yield held


def _cut_blindly(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Yield halves of halves of a text without spaces; a single character is never cut."""
    if len(text) < 2 or fits(text):
        yield text
    else:
        for half in (text[: len(text) // 2], text[len(text) // 2 :]):
            yield from _cut_blindly(half, fits)
