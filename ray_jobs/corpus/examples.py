"""What one input file gives: examples to train on, and what was dropped and why."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from ray_jobs.core.errors import DataError
from ray_jobs.core.records import Pair, content_id
from ray_jobs.corpus.chunks import chunk_text, cut_chunks
from ray_jobs.corpus.documents import read_document
from ray_jobs.corpus.duplicates import signature
from ray_jobs.corpus.files import InputFile
from ray_jobs.corpus.language import detect_language, words
from ray_jobs.corpus.pairs import Row, parse_pair, parse_text, read_rows
from ray_jobs.corpus.plain_texts import PlainTexts
from ray_jobs.corpus.template import ChatTemplate, Encoded


class Example(NamedTuple):
    """One chunk, pair or text, encoded; `record` is its row in chunks.parquet, pairs.jsonl or texts.jsonl, `where` its place in words."""

    kind: Literal["chunk", "pair", "text"]
    example_id: str
    where: str
    record: dict[str, Any]
    encoded: Encoded
    signature: bytes
    question_key: str = ""
    source: str = ""
    """Name of the input file that it comes from, as the config spells it."""


class Dropped(NamedTuple):
    """What was left out, and why; `num` counts what stands in one line."""

    reason: str
    what: str
    num: int = 1


def document_examples(file: InputFile, *, template: ChatTemplate | PlainTexts, chunk_tokens: int) -> Iterator[Example | Dropped]:
    """Yield the chunks of a document; a broken file is dropped.

    Args:
        chunk_tokens: budget of one chunk.
    """
    try:
        document = read_document(file)
    except DataError as error:
        yield Dropped("unreadable document", f"{file.name}: {error}")
        return
    if document.num_boilerplate:
        yield Dropped("boilerplate", f"{file.name}: {document.num_boilerplate} lines or elements", document.num_boilerplate)
    language = detect_language(document.text)
    for chunk in cut_chunks(document.text, budget=chunk_tokens, count=template.count):
        text = chunk_text(chunk.heading, chunk.text)
        encoded = template.encode_text(text)
        where = f"{file.name}: {chunk.heading or chunk.text[:40]}"
        if len(words(chunk.text)) < 2:
            yield Dropped("too short", where)
        elif len(encoded.input_ids) > chunk_tokens:
            yield Dropped("too long", f"{where}: {len(encoded.input_ids)} tokens cannot be cut to {chunk_tokens}")
        else:
            chunk_id = content_id(chunk.heading, chunk.text)
            num_tokens = len(encoded.input_ids)
            record = {"chunk_id": chunk_id, "document": file.name, **chunk._asdict(), "num_tokens": num_tokens, "language": language}
            yield Example("chunk", chunk_id, where, record, encoded, signature(chunk.text), source=file.name)


def pair_examples(file: InputFile, *, template: ChatTemplate | PlainTexts, max_length: int) -> Iterator[Example | Dropped]:
    """Yield the pairs of a file; a broken row or file is dropped, and so is a pair longer than `max_length` tokens."""
    try:
        for row in read_rows(file):
            yield _from_row(row, file.name, template=template, max_length=max_length)
    except DataError as error:
        yield Dropped("unreadable pairs file", f"{file.name}: {error}")


def _from_row(row: Row, source: str, *, template: ChatTemplate | PlainTexts, max_length: int) -> Example | Dropped:
    try:
        pair = parse_pair(row)
    except DataError as error:
        return Dropped("broken row", str(error))
    return pair_example(pair, where=row.where, source=source, template=template, max_length=max_length)


def pair_example(pair: Pair, *, where: str, source: str, template: ChatTemplate | PlainTexts, max_length: int) -> Example | Dropped:
    """Return a pair as an example, or dropped where it is longer than a row.

    Args:
        where: its place, for people.
        source: name of the input file that it comes from.
    """
    encoded = template.encode_pair(pair.question, pair.answer)
    if len(encoded.input_ids) > max_length:
        return Dropped("too long", f"{where}: {len(encoded.input_ids)} tokens, a row has {max_length}")
    text = f"{pair.question}\n{pair.answer}"
    return Example("pair", pair.pair_id, where, pair.model_dump(), encoded, signature(text), question_key(pair.question), source)


def text_examples(file: InputFile, *, texts: PlainTexts) -> Iterator[Example | Dropped]:
    """Yield the texts of a file; a broken row or file is dropped, and so is a label that is no class of the model."""
    try:
        for row in read_rows(file):
            try:
                text = parse_text(row)
                encoded = texts.encode_text(text.text, label=text.label)
            except DataError as error:
                yield Dropped("broken row", str(error))
                continue
            yield Example("text", text.text_id, row.where, text.model_dump(), encoded, signature(text.text), source=file.name)
    except DataError as error:
        yield Dropped("unreadable texts file", f"{file.name}: {error}")


def question_key(question: str) -> str:
    """Return the same key for questions that differ in case, spaces and punctuation only."""
    return content_id(words(question))
