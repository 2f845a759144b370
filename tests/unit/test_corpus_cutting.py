"""Chunks, near-duplicates, packing, selection: properties, and numbers against independent references."""

import random

import pytest

from ray_jobs.core.records import Question
from ray_jobs.corpus.chunks import chunk_text, cut_chunks, split_sections
from ray_jobs.corpus.duplicates import NearDuplicates, signature, similarity
from ray_jobs.corpus.examples import Dropped, Example
from ray_jobs.corpus.language import words
from ray_jobs.corpus.leaks import drop_leaks, reference_runs
from ray_jobs.corpus.packing import IGNORE, pack, packed_row
from ray_jobs.corpus.selection import Pick, Selector, hold_out, plan_shards
from ray_jobs.corpus.template import Encoded

NOTES = """Preface text.

# Memory

Intro of it.

## Paging

A page is a block. A frame holds it.

```python
# not a heading
## nor this
```

## Paging in practice ##

Text.

# Files

### Deep

Body.
"""


def count(text):
    return len(text.split())


def grams(text):
    seen = words(text)
    return {tuple(seen[i : i + 3]) for i in range(len(seen) - 2)}


def test_sections_carry_the_path_of_their_headings():
    sections = dict(split_sections(NOTES))
    assert list(sections) == ["", "Memory", "Memory > Paging", "Memory > Paging in practice", "Files > Deep"]
    assert "# not a heading" in sections["Memory > Paging"]


@pytest.mark.parametrize("budget", [6, 9, 17, 60, 1000])
def test_chunks_keep_every_word_within_the_budget(budget):
    paragraphs = [" ".join(f"w{p}x{i}{'.' if i % 7 == 6 else ''}" for i in range(5 + 13 * p)) for p in range(6)]
    text = "# Head line\n\n" + "\n\n".join(paragraphs)
    chunks = list(cut_chunks(text, budget=budget, count=count))
    assert " ".join(c.text for c in chunks).split() == " ".join(paragraphs).split()
    assert max(count(chunk_text(*c)) for c in chunks) <= budget
    assert {c.heading for c in chunks} == {"Head line"}
    assert len(chunks) == 1 if budget == 1000 else len(chunks) > 1


def test_a_chunk_ends_where_a_paragraph_or_sentence_does_if_it_can():
    text = "One two three. Four five six. Seven eight nine.\n\nTen eleven."
    assert [c.text for c in cut_chunks(text, budget=6, count=count)] == [
        "One two three. Four five six.",
        "Seven eight nine.\n\nTen eleven.",
    ]


def test_a_text_without_spaces_is_still_cut():
    chunks = list(cut_chunks("x" * 100, budget=16, count=len))
    assert "".join(c.text for c in chunks) == "x" * 100 and all(len(c.text) <= 16 for c in chunks)


def test_minhash_estimates_the_jaccard_similarity():
    rng = random.Random(0)
    base = [f"word{rng.randrange(5000)}" for _ in range(400)]
    for changed in (0, 10, 40, 120):
        other = list(base)
        for place in rng.sample(range(400), changed):
            other[place] = "changed"
        one, two = " ".join(base), " ".join(other)
        exact = len(grams(one) & grams(two)) / len(grams(one) | grams(two))
        assert similarity(signature(one), signature(two)) == pytest.approx(exact, abs=4 * 0.5 / 128**0.5)


def test_repeats_are_found_and_others_are_not():
    index = NearDuplicates(0.8)
    text = " ".join(f"token{i}" for i in range(200))
    index.add("first", signature(text))
    assert index.find(signature(text.upper() + " !!")) == "first"
    assert index.find(signature(text + " and one more sentence")) == "first"
    assert index.find(signature(" ".join(f"other{i}" for i in range(200)))) is None
    assert index.find(signature(" ".join(text.split()[:100]))) is None
    only_equal = NearDuplicates(1.0)
    only_equal.add("first", signature(text))
    assert only_equal.find(signature(text)) == "first" and only_equal.find(signature(text + " x")) is None


def test_short_texts_have_signatures_too():
    assert similarity(signature("Yes."), signature("yes")) == 1.0
    assert similarity(signature("Yes."), signature("No.")) < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_packing_loses_nothing_and_is_dense(seed):
    rng = random.Random(seed)
    capacity = rng.randrange(20, 300)
    lengths = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(1, 400))]
    groups = pack(lengths, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= capacity for group in groups)
    fewest = -(-sum(lengths) // capacity)
    above_half = sum(2 * length > capacity for length in lengths)
    assert len(groups) <= max(fewest, above_half) * 11 / 9 + 1
    assert groups == pack(lengths, capacity) and groups == sorted(groups)


def test_packing_known_cases():
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="above the capacity"):
        pack([11], 10)


def test_a_packed_row_keeps_its_examples_apart():
    row = packed_row(["a", "b"], [Encoded([1, 2, 3], 1), Encoded([4, 5, 6, 7], 3)])
    assert row["input_ids"] == [1, 2, 3, 4, 5, 6, 7]
    assert row["labels"] == [IGNORE, 2, 3, IGNORE, IGNORE, IGNORE, 7]
    assert row["segment_lengths"] == [3, 4]
    assert packed_row(["a"], [Encoded([1, 2], 0)])["labels"] == [IGNORE, 2]
    assert "segment_sources" not in row
    two_texts = Encoded([4, 5, 6, 7], 3, None, [1, 3])
    named = packed_row(["a", "b"], [Encoded([1], 1), two_texts], sources=["a.md", "b.jsonl"])
    assert named["segment_sources"] == ["a.md", "b.jsonl", "b.jsonl"]
    assert row["row_id"] != packed_row(["b", "a"], [Encoded([1], 1), Encoded([1], 1)])["row_id"]


def test_held_out_share_is_close_and_does_not_depend_on_the_others():
    ids = [f"id{n}" for n in range(5000)]
    held = hold_out(ids, 0.1)
    assert len(held) / 5000 == pytest.approx(0.1, abs=0.02)
    assert hold_out(ids[:2500], 0.1) == held & set(ids[:2500])
    assert held <= hold_out(ids, 0.2)
    assert hold_out(ids, 0.0) == set() and hold_out(ids, 1.0) == set(ids)


def test_something_is_held_out_of_two():
    assert len(hold_out(["a", "b"], 1e-9)) == 1 and hold_out(["a"], 1e-9) == set()


def test_shards_hold_each_example_once():
    picks = [Pick("pair", f"id{n}", f"part{n // 1000}", n % 1000) for n in range(9000)]
    shards = plan_shards(picks, eval_share=0.1)
    seen = [(part, row) for shard in shards for part, rows in shard.picks for row in rows]
    assert sorted(seen) == [(pick.part, pick.row) for pick in picks]
    assert [(s.split, s.number) for s in shards] == [("train", 0), ("train", 1), ("eval", 0)]
    assert [s.picks for s in plan_shards(picks[:1], eval_share=0.0)] == [[("part0", [0])], []]


def row(kind, example_id, text, key=""):
    return {"kind": kind, "example_id": example_id, "signature": signature(text), "question_key": key, "where": ""}


def test_the_first_of_repeats_stays_and_the_evaluation_is_kept_out():
    question = Question(question_id="q", question="What is paging?", reference="Paging maps pages to frames by a table, page by page.")
    selector = Selector(near_duplicate=0.8, questions=[question])
    text = " ".join(f"token{i}" for i in range(60))
    assert selector.reason_to_drop(row("chunk", "1", text)) is None
    assert selector.reason_to_drop(row("chunk", "2", text + " more")) == "near-duplicate"
    assert selector.reason_to_drop(row("pair", "3", text)) is None
    assert selector.reason_to_drop(row("pair", "3", "another text with the same id as above")) == "duplicate id"
    copied = f"{question.question.lower()}\n{question.reference}"
    assert selector.reason_to_drop(row("pair", "4", copied)) == "evaluation question"


REFERENCE = "A page table maps each page of a process to the frame that holds it, and the MMU reads it."


@pytest.mark.parametrize("kind", ["chunk", "pair"])
def test_what_holds_a_sample_answer_is_dropped_as_an_evaluation_question(kind):
    asked = reference_runs([Question(question_id="q", question="What is a page table?", reference=REFERENCE)])

    def example(text):
        record = {"text": text} if kind == "chunk" else {"question": "Something else?", "answer": text}
        return Example(kind, text, f"notes.md: {text[:5]}", record, Encoded([1], 0), signature(text))

    leaked = [example(REFERENCE), example("As we said, " + " ".join(REFERENCE.upper().split()[2:12]) + " and more " * 200)]
    kept = [example("A page table maps each page to a frame."), Dropped("too long", "x")]
    found = list(drop_leaks([*leaked, *kept], asked))
    assert found == [*(Dropped("evaluation question", item.where) for item in leaked), *kept]
    assert list(drop_leaks(leaked, frozenset())) == leaked
