"""Readers: Markdown, text, HTML and PDF to Markdown with headings, without boilerplate."""

import io
import re
import zlib
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

from ray_jobs.core.errors import DataError
from ray_jobs.corpus.clean import join_pages, normalise, one_line
from ray_jobs.corpus.files import InputFile


class Document(NamedTuple):
    """The text of a file as Markdown, and how many lines or elements of boilerplate were left out."""

    text: str
    num_boilerplate: int


_NAVIGATION = ["nav", "header", "footer", "aside", "script", "style", "noscript", "template", "form", "button", "svg", "iframe"]
_NAVIGATION_ROLES = {"navigation", "banner", "contentinfo", "search", "complementary"}
_HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
_CONTAINERS = ["html", "body", "main", "article", "section", "div", "ul", "ol", "dl", "table", "tbody", "figure", "details"]
_BLOCKS = [*_HEADINGS, *_CONTAINERS, "p", "li", "pre", "blockquote", "tr", "dt", "dd", "caption", "figcaption", "summary"]
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)?(---|\.\.\.)\n", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_UNDERLINED = re.compile(r"^(?![#\s>*-])(.+)\n(=+|-{3,})$", re.MULTILINE)


def read_document(file: InputFile) -> Document:
    """Return the text of a file.

    Raises:
        DataError: it cannot be read as what its suffix says, or has no text.
    """
    document = READERS[file.suffix](file.read())
    text = normalise(document.text)
    if not re.search(r"\w", text):
        raise DataError("no text in it" + (" (a scan?)" if file.suffix == ".pdf" else ""))
    return Document(text, document.num_boilerplate)


def read_text(data: bytes) -> Document:
    """Read Markdown or plain text in UTF-8, without front matter and comments.

    Underlined headings become `#` headings; form feeds end pages.
    """
    text, num_boilerplate = decode(data).replace("\r\n", "\n"), 0
    for pattern in (_FRONT_MATTER, _COMMENT):
        text, num_found = pattern.subn("", text)
        num_boilerplate += num_found
    if text.count("\f") > 1:
        text, num_dropped = join_pages(text.split("\f"))
        num_boilerplate += num_dropped
    return Document(_UNDERLINED.sub(lambda m: f"{'#' if m[2][0] == '=' else '##'} {m[1]}", text), num_boilerplate)


def read_html(data: bytes) -> Document:
    """Read the headings, paragraphs, lists, tables and code of the page's main part, without navigation."""
    from bs4 import BeautifulSoup, NavigableString

    soup = BeautifulSoup(data, "html.parser")
    body = soup.find("main") or soup.find("article") or soup.body or soup
    boilerplate = body.find_all(_NAVIGATION) + body.find_all(attrs={"role": list(_NAVIGATION_ROLES)})
    for element in boilerplate:
        element.extract()
    for line_break in body.find_all("br"):
        line_break.replace_with("\n")
    for cell in body.find_all(["td", "th"]):
        cell.append(" | ")
    strings = [string for string in body.find_all(string=True) if type(string) is NavigableString]
    blocks = [_markdown(name, "".join(texts)) for (_, name), texts in groupby(strings, key=_block_of)]
    return Document("\n\n".join(filter(None, blocks)), len(boilerplate))


def read_pdf(data: bytes) -> Document:
    """Read a PDF's text, page by page, without repeated headers and footers.

    Raises:
        DataError: it is broken or encrypted.
    """
    import pypdf
    from pypdf.errors import DependencyError, PyPdfError

    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except (PyPdfError, DependencyError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"not a readable PDF: {error}") from None
    return Document(*join_pages(pages))


def decode(data: bytes) -> str:
    """Return UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _block_of(string: Any) -> tuple[int, str]:
    """Return which block a string is in, and its tag: a block's own text around an inner block stays in its place."""
    block = string.find_parent(_BLOCKS)
    return id(block), block.name if block else "p"


def _markdown(name: str, text: str) -> str:
    if name == "pre":
        return f"```\n{text.strip()}\n```"
    text = one_line(text).removesuffix(" |")
    if name in _HEADINGS:
        return f"{'#' * int(name[1])} {text}" if text else ""
    return f"- {text}" if name == "li" and text else text


READERS: dict[str, Callable[[bytes], Document]] = {
    ".md": read_text,
    ".markdown": read_text,
    ".txt": read_text,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
}
"""Reader of each suffix."""
