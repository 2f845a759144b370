"""A model writes question/answer pairs from chunks: first a question, then its answer with the chunk at hand."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ray_jobs.core.records import Pair, content_id
from ray_jobs.corpus.clean import normalise, one_line
from ray_jobs.corpus.examples import Dropped
from ray_jobs.corpus.language import detect_language, words
from ray_jobs.corpus.template import chat_messages

CHUNKS_PER_BATCH = 8
"""Chunks that are written about at once: the unit of work and of resuming."""
_MAX_QUESTION_TOKENS = 64
_MAX_ANSWER_TOKENS = 160
_SAMPLING_TEMPERATURE = 0.7  # of questions only, so that a second pair asks something else; answers are greedy
_MIN_SUPPORT = 0.5
_MIN_WORDS = 4
_PROMPTS = {
    "en": (
        "Read this passage from a lecture:\n\n{text}\n\nWrite one exam question about it. Reply with the question only.",
        "Read this passage from a lecture:\n\n{text}\n\nAnswer this question in two or three sentences, from the passage alone: {question}",
    ),
    "de": (
        "Lies diesen Abschnitt einer Vorlesung:\n\n{text}\n\nSchreibe eine Prüfungsfrage dazu. Antworte nur mit der Frage.",
        "Lies diesen Abschnitt einer Vorlesung:\n\n{text}\n\n"
        "Beantworte diese Frage in zwei oder drei Sätzen, nur aus dem Abschnitt: {question}",
    ),
}


class Engine(Protocol):
    """What is needed of a loaded model."""

    def generate(self, chats: Sequence[Any], *, max_new_tokens: int, sampling_temperature: float, seed: int) -> list[Any]:
        """Return one completion with `text` and `finish_reason` a chat."""


def write_pairs(engine: Engine, chunks: list[dict[str, Any]], *, num_pairs: int, seed: int) -> Iterator[tuple[str, Pair | Dropped]]:
    """Yield `num_pairs` pairs a chunk, or what was dropped in their place, each after the name of the chunk's document.

    Args:
        chunks: rows of chunks.parquet.
        seed: of the sampled questions.
    """
    for number in range(num_pairs):
        ask = [_prompt(chunk, 0) for chunk in chunks]
        asked = engine.generate(
            ask, max_new_tokens=_MAX_QUESTION_TOKENS, sampling_temperature=_SAMPLING_TEMPERATURE, seed=seed * num_pairs + number
        )
        questions = [_first_question(completion.text) for completion in asked]
        reply = [_prompt(chunk, 1, question=question) for chunk, question in zip(chunks, questions, strict=True)]
        answers = engine.generate(reply, max_new_tokens=_MAX_ANSWER_TOKENS, sampling_temperature=0.0, seed=seed)
        for chunk, question, answer in zip(chunks, questions, answers, strict=True):
            yield chunk["document"], _pair(chunk, question, answer)


def unusable(question: str, answer: str, text: str, *, is_whole: bool) -> str:
    """Return why a written pair cannot be trained on, or "".

    Args:
        text: the chunk; at least half of the answer's longer words must stand in it, else the model made them up.
        is_whole: whether the model ended the answer by itself.
    """
    if len(words(question)) < _MIN_WORDS:
        return f"no question: {question[:60]!r}"
    if not is_whole or len(words(answer)) < _MIN_WORDS:
        return "answer too short" if is_whole else "answer without an end"
    answered, given = ({word for word in words(part) if len(word) > 3} for part in (answer, text))
    support = len(answered & given) / max(1, len(answered))
    return "" if support >= _MIN_SUPPORT else f"only {support:.0%} of the answer's words are in the chunk"


def _pair(chunk: dict[str, Any], question: str, completion: Any) -> Pair | Dropped:
    answer = normalise(completion.text)
    reason = unusable(question, answer, chunk["text"], is_whole=completion.finish_reason == "stop")
    where = f"{chunk['document']}: {chunk['heading']}"
    if reason:
        return Dropped("unusable written pair", f"{where}: {reason}")
    return Pair(
        pair_id=content_id(question, answer),
        question=question,
        answer=answer,
        topic=chunk["heading"],
        language=detect_language(f"{question} {answer}"),
        source=f"written from {where}",
    )


def _prompt(chunk: dict[str, Any], which: int, **values: str) -> list[dict[str, str]]:
    prompts = _PROMPTS.get(chunk["language"], _PROMPTS["en"])
    return chat_messages(prompts[which].format(text=f"{chunk['heading']}\n\n{chunk['text']}", **values))


def _first_question(text: str) -> str:
    """Return the first line that asks, from its first word to the question mark."""
    for line in text.splitlines():
        question, mark, _ = line.partition("?")
        if mark:
            return one_line(question.strip(" *#\"'-0123456789.)")) + "?"
    return ""
