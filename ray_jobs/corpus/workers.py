"""The three jobs of prepare that run anywhere: read a file, write pairs from chunks, pack a shard. Plain callables.

Each takes one JSON object and returns one; what it makes lies in the storage, so that nothing big passes through the driver.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ray_jobs.core.records import Pair
from ray_jobs.core.storage import Storage
from ray_jobs.corpus import documents
from ray_jobs.corpus.examples import Dropped, Example, document_examples, pair_example, pair_examples, text_examples
from ray_jobs.corpus.files import InputFile
from ray_jobs.corpus.leaks import drop_leaks
from ray_jobs.corpus.parts import read_records, write_unit
from ray_jobs.corpus.plain_texts import PlainTexts
from ray_jobs.corpus.selection import Shard
from ray_jobs.corpus.tables import write_shard
from ray_jobs.corpus.template import ChatTemplate
from ray_jobs.corpus.writer import Engine, write_pairs


class ReadFile:
    """A document, a file of pairs or a file of texts to examples.

    Args:
        make_template: returns the model's chat template, or how an encoder reads texts, on the machine that needs it.
        chunk_tokens: budget of one chunk.
        max_length: tokens of one packed row.
        asked: runs of the evaluation's sample answers, which no example may hold.
    """

    def __init__(
        self,
        *,
        parts: Storage,
        make_template: Callable[[], ChatTemplate | PlainTexts],
        chunk_tokens: int,
        max_length: int,
        asked: frozenset[str] = frozenset(),
    ):
        self._parts = parts
        self._template = make_template()
        self._chunk_tokens = min(chunk_tokens, max_length)
        self._max_length = max_length
        self._asked = asked

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Read {"unit", "file": [uri, name]}; with "texts": true it is a file of texts."""
        file = InputFile(*item["file"])
        if item.get("texts") and isinstance(self._template, PlainTexts):
            found = text_examples(file, texts=self._template)
        elif file.suffix in documents.READERS:
            found = document_examples(file, template=self._template, chunk_tokens=self._chunk_tokens)
        else:
            found = pair_examples(file, template=self._template, max_length=self._max_length)
        write_unit(self._parts, item["unit"], drop_leaks(found, self._asked))
        return {}


class WritePairs:
    """Chunks to pairs, by a model.

    Args:
        make_engine: returns the loaded model.
        pairs_per_chunk: how many to write from each.
        asked: as in `ReadFile`.
    """

    def __init__(
        self,
        *,
        parts: Storage,
        make_template: Callable[[], ChatTemplate | PlainTexts],
        make_engine: Callable[[], Engine],
        pairs_per_chunk: int,
        max_length: int,
        seed: int,
        asked: frozenset[str] = frozenset(),
    ):
        self._parts = parts
        self._template = make_template()
        self._engine = make_engine()
        self._pairs_per_chunk = pairs_per_chunk
        self._max_length = max_length
        self._seed = seed
        self._asked = asked

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write {"unit", "part", "rows"}."""
        chunks = read_records(self._parts, item["part"], item["rows"])
        write_unit(self._parts, item["unit"], drop_leaks(self._examples(chunks), self._asked))
        return {}

    def _examples(self, chunks: list[dict[str, Any]]) -> Iterator[Example | Dropped]:
        for document, pair in write_pairs(self._engine, chunks, num_pairs=self._pairs_per_chunk, seed=self._seed):
            if isinstance(pair, Pair):
                yield pair_example(pair, where=pair.source, source=document, template=self._template, max_length=self._max_length)
            else:
                yield pair


class PackShard:
    """A shard of examples to one file of packed rows."""

    def __init__(self, *, parts: Storage, target: Storage, max_length: int):
        self._parts = parts
        self._target = target
        self._max_length = max_length

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Pack {"shard": [split, number, picks]} and return its split and counts."""
        shard = Shard(*item["shard"])
        return {"split": shard.split, **write_shard(self._parts, self._target, shard, max_length=self._max_length)}
