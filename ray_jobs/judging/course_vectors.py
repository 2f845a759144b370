"""Word vectors trained on the course itself: for its jargon, and for languages that no embedded vectors know."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ray_jobs.core.errors import DataError
from ray_jobs.core.storage import Storage
from ray_jobs.judging.pooling import words

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

WORDS_TO_READ = 1_000_000
"""Words that training reads in all: a small course is read up to 40 times, a large one five times."""
SETTINGS = {"vector_size": 50, "window": 5, "min_count": 2, "sg": 1, "negative": 10, "sample": 1e-3}
"""Skip-gram, which does better than CBOW on little text (Mikolov et al. 2013, arXiv:1301.3781)."""
MIN_WORDS = 1000
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def course_texts(prepared: Storage) -> list[str]:
    """Return what `prepare` wrote: its chunks, and the questions and answers of its pairs."""
    chunks = prepared.read_parquet("chunks.parquet") if prepared.exists("chunks.parquet") else []
    pairs = prepared.read_jsonl("pairs.jsonl") if prepared.exists("pairs.jsonl") else []
    return [row["text"] for row in chunks] + [row[key] for row in pairs for key in ("question", "answer")]


def sentences(texts: Iterable[str]) -> list[list[str]]:
    """Return the words of each sentence of texts."""
    found = [words(sentence) for text in texts for sentence in _SENTENCE_END.split(text)]
    return [sentence for sentence in found if sentence]


def course_sha(corpus: list[list[str]], *, seed: int) -> str:
    """Return the hash of all that decides the vectors: the corpus, the settings, the seed and gensim's version."""
    import gensim

    return hashlib.sha256(json.dumps([corpus, SETTINGS, WORDS_TO_READ, seed, gensim.__version__]).encode()).hexdigest()


def train(corpus: list[list[str]], *, seed: int) -> "KeyedVectors":
    """Return word vectors of a corpus, with true word counts; the same corpus and seed give the same bits.

    One thread: with more, the order of updates is a race and no two trainings agree.

    Args:
        corpus: the words of each sentence.
        seed: of the initial vectors and the negative samples.

    Raises:
        DataError: the corpus has fewer than 1,000 words.
    """
    from gensim.models import Word2Vec

    num_words = sum(map(len, corpus))
    if num_words < MIN_WORDS:
        raise DataError(
            f'[judge] vectors = "course" has {num_words} words to learn from, at least {MIN_WORDS} are needed: '
            'give prepare more documents, or use vectors = "glove-6b-50d" or a file'
        )
    epochs = min(40, max(5, WORDS_TO_READ // num_words))
    return Word2Vec(corpus, **SETTINGS, seed=seed, workers=1, epochs=epochs).wv
