"""What of the evaluation stands in training text: runs of words that a sample answer shares with it."""

from collections.abc import Iterable, Iterator

from ray_jobs.core.records import Question
from ray_jobs.corpus.examples import Dropped, Example
from ray_jobs.corpus.language import words

RUN_WORDS = 8
"""Words in a row that two texts on the same matter hardly share by chance."""
_TEXT = {"chunk": "text", "pair": "answer", "text": "text"}


def runs(text: str) -> frozenset[str]:
    """Return all runs of `RUN_WORDS` words of a text, in lower case and without punctuation; none where it is shorter."""
    seen = words(text)
    return frozenset(" ".join(seen[i : i + RUN_WORDS]) for i in range(len(seen) - RUN_WORDS + 1))


def reference_runs(questions: Iterable[Question]) -> frozenset[str]:
    """Return the runs of all sample answers."""
    return frozenset().union(*(runs(question.reference) for question in questions))


def drop_leaks(found: Iterable[Example | Dropped], asked: frozenset[str]) -> Iterator[Example | Dropped]:
    """Yield what was found; a chunk, a text, or a pair whose answer, shares a run with a sample answer is dropped.

    Args:
        asked: runs of the sample answers.
    """
    for item in found:
        if isinstance(item, Example) and not asked.isdisjoint(runs(item.record[_TEXT[item.kind]])):
            yield Dropped("evaluation question", item.where)
        else:
            yield item
