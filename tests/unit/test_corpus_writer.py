"""Pairs that a model writes: a scripted engine stands for the model, through the interface that any engine has."""

from typing import NamedTuple

import pytest

from ray_jobs.core.records import Pair
from ray_jobs.corpus.examples import Dropped
from ray_jobs.corpus.writer import unusable, write_pairs

CHUNK = {
    "document": "notes.md",
    "heading": "Paging",
    "text": "The page table maps each virtual page to a physical frame of main memory.",
    "language": "en",
}


class Reply(NamedTuple):
    text: str
    finish_reason: str = "stop"


class ScriptedEngine:
    """Replies from a list, and remembers what it was asked."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []

    def generate(self, chats, *, max_new_tokens, sampling_temperature, seed):
        self.asked.append((chats, sampling_temperature, seed))
        return [self.replies.pop(0) for _ in chats]


def test_a_question_is_asked_then_answered_with_the_chunk_at_hand():
    engine = ScriptedEngine(
        Reply('Sure!\n1. "What does the page table map?" Good luck'), Reply("The page table maps a virtual page to a frame.")
    )
    ((document, pair),) = write_pairs(engine, [CHUNK], num_pairs=1, seed=3)
    assert isinstance(pair, Pair) and document == "notes.md"
    assert (pair.question, pair.answer) == ("What does the page table map?", "The page table maps a virtual page to a frame.")
    assert pair.source == "written from notes.md: Paging" and pair.language == "en"
    (ask, reply) = engine.asked
    assert ask[1] > 0 and reply[1] == 0
    assert CHUNK["text"] in ask[0][0][0]["content"] and pair.question in reply[0][0][0]["content"]


def test_each_round_samples_with_another_seed():
    replies = [Reply("What does it map here?"), Reply("The page table maps a virtual page.")] * 4
    engine = ScriptedEngine(*replies)
    assert len(list(write_pairs(engine, [CHUNK], num_pairs=2, seed=0)) + list(write_pairs(engine, [CHUNK], num_pairs=2, seed=1))) == 4
    assert len({seed for _, temperature, seed in engine.asked if temperature > 0}) == 4


def test_german_chunks_are_asked_about_in_german():
    engine = ScriptedEngine(Reply("Was bildet die Seitentabelle ab?"), Reply("Die Seitentabelle bildet Seiten auf Kacheln ab."))
    chunk = CHUNK | {"text": "Die Seitentabelle bildet Seiten auf Kacheln ab.", "language": "de"}
    ((_, pair),) = write_pairs(engine, [chunk], num_pairs=1, seed=0)
    assert pair.language == "de" and "Prüfungsfrage" in engine.asked[0][0][0][0]["content"]


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        (Reply("I cannot do that."), Reply("The page table maps a virtual page."), "no question"),
        (Reply("What does the table map?"), Reply("The page table maps a virtual page", "length"), "without an end"),
        (Reply("What does the table map?"), Reply("Pages."), "too short"),
        (Reply("What does the table map?"), Reply("Elephants usually migrate southwards every winter."), "only 0%"),
    ],
)
def test_what_cannot_be_trained_on_is_dropped_with_its_reason(question, answer, reason):
    ((_, dropped),) = write_pairs(ScriptedEngine(question, answer), [CHUNK], num_pairs=1, seed=0)
    assert isinstance(dropped, Dropped) and dropped.reason == "unusable written pair" and reason in dropped.what


def test_an_answer_from_the_chunk_is_usable():
    assert unusable("What does the table map?", "Each virtual page to a frame.", CHUNK["text"], is_whole=True) == ""
