"""The course: as large as promised, and no evaluation question or sample answer in training text."""

import json
import re
from pathlib import Path

import pytest

from ray_jobs.core.records import Question
from ray_jobs.corpus.duplicates import NearDuplicates, signature
from ray_jobs.corpus.files import InputFile
from ray_jobs.corpus.language import detect_language, words
from ray_jobs.corpus.leaks import RUN_WORDS, reference_runs, runs
from ray_jobs.corpus.pairs import read_questions

COURSE = Path(__file__).parents[2] / "ray_jobs" / "datasets" / "os_course"
STOP_WORDS = set(
    "a an the of in to is are was were be been and or not no it its this that these those with for on by as at from what why how which "
    "when who does do did can could would should has have had if than then so such between one two each every all only but into their his "
    "her they he she we you i there will may must about more most other explain describe compare der die das den dem des ein eine einer "
    "eines einen und oder ist sind wird werden im in zu zum zur von vom mit auf bei für aus was wie warum welche welcher nicht".split()
)


def rows(name):
    return [json.loads(line) for line in (COURSE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def lectures():
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((COURSE / "lectures").glob("*.md"))}


@pytest.fixture(scope="module")
def pairs():
    return rows("pairs.jsonl")


@pytest.fixture(scope="module")
def questions():
    return rows("questions.jsonl")


def content(text):
    return set(words(text)) - STOP_WORDS


def jaccard(one, other):
    return len(one & other) / max(1, len(one | other))


def leaks(questions, pairs, texts):
    """Yield (what, question) of everything the evaluation shares with training text."""
    trained_runs = {run for text in texts for run in runs(text)}
    trained_runs |= {run for pair in pairs for key in ("question", "answer") for run in runs(pair[key])}
    index = NearDuplicates(0.5)
    for number, text in enumerate([*texts, *(p["question"] for p in pairs), *(p["answer"] for p in pairs)]):
        index.add(str(number), signature(text))
    asked = [content(pair["question"]) for pair in pairs]
    answered = [content(pair["answer"]) for pair in pairs]
    for question in questions:
        for key in ("question", "reference"):
            if runs(question[key]) & trained_runs:
                yield f"a run of {RUN_WORDS} words of the {key}", question["question"]
            if index.find(signature(question[key])):
                yield f"a near-duplicate of the {key}", question["question"]
        if max(jaccard(content(question["question"]), other) for other in asked) >= 0.6:
            yield "a training question", question["question"]
        if max(jaccard(content(question["reference"]), other) for other in answered) >= 0.5:
            yield "a training answer", question["question"]


def test_it_is_as_large_as_promised(lectures, pairs, questions):
    german = [text for text in lectures.values() if detect_language(text) == "de"]
    assert len(lectures) >= 14 and sum(len(text.encode()) for text in lectures.values()) >= 80_000
    assert len(german) >= 2
    assert len(pairs) >= 400 and sum(pair["language"] == "de" for pair in pairs) >= 40
    assert len(questions) == 100 and sum(question["language"] == "de" for question in questions) >= 12


def test_rows_are_whole(lectures, pairs, questions):
    topics = {name.partition("_")[2] for name in lectures}
    for row, keys in [(row, ("question", "answer")) for row in pairs] + [(row, ("question", "reference")) for row in questions]:
        assert set(row) == {*keys, "topic", "language"} and all(row[key].strip() == row[key] != "" for key in row)
        assert row["topic"] in topics and row["language"] in ("en", "de")


def test_every_lecture_is_asked_about(lectures, pairs, questions):
    topics = {name.partition("_")[2] for name in lectures}
    assert {pair["topic"] for pair in pairs} == topics == {question["topic"] for question in questions}


def test_sample_answers_have_40_to_120_words(questions):
    lengths = [len(question["reference"].split()) for question in questions]
    assert min(lengths) >= 40 and max(lengths) <= 120


def test_the_two_questions_every_examiner_asks(questions):
    asked = [question["question"] for question in questions]
    assert "What is big data?" in asked
    assert any(re.search(r"purpose.*base and limit registers.*advantages and disadvantages", question) for question in asked)


def test_no_question_stands_twice(pairs, questions):
    for table in (pairs, questions):
        asked = [tuple(words(row["question"])) for row in table]
        assert len(asked) == len(set(asked))


def test_pairs_do_not_repeat_each_other(pairs):
    index = NearDuplicates(0.7)
    for number, pair in enumerate(pairs):
        text = f"{pair['question']}\n{pair['answer']}"
        assert index.find(signature(text)) is None, pair["question"]
        index.add(str(number), signature(text))


def test_the_language_is_told_right(pairs, questions):
    texts = [(row["question"] + " " + row.get("answer", row.get("reference")), row["language"]) for row in pairs + questions]
    assert [text for text, language in texts if detect_language(text) != language] == []


def test_questions_load_with_unique_ids(questions):
    loaded = read_questions(InputFile(str(COURSE / "questions.jsonl"), "questions.jsonl"))
    assert len({question.question_id for question in loaded}) == len(questions)


def test_nothing_of_the_evaluation_is_in_training_text(lectures, pairs, questions):
    assert list(leaks(questions, pairs, lectures.values())) == []


@pytest.mark.parametrize(
    "plant",
    [
        lambda question: {"question": "Something else entirely, asked here?", "answer": question["reference"]},
        lambda question: {"question": question["question"], "answer": "An answer about something else entirely."},
        lambda question: {"question": "Something else?", "answer": " ".join(["Also,", *question["reference"].split()[5:20], "and so on."])},
        lambda question: {"question": "Something else?", "answer": " ".join(sorted(question["reference"].split()))},
    ],
    ids=["sample answer", "question", "a run of words", "same words in another order"],
)
def test_a_planted_leak_is_found(pairs, questions, plant):
    question = questions[40]
    assert list(leaks([question], pairs[:1], [])) == []
    assert list(leaks([question], [*pairs[:1], plant(question)], []))


def test_a_leak_in_a_lecture_is_found(pairs, questions):
    question = questions[7]
    assert list(leaks([question], pairs[:1], [f"# Notes\n\nAs we said: {question['reference']}\n"]))


def test_prepare_drops_nothing_of_it_as_a_leak(lectures, pairs, questions):
    asked = reference_runs(
        Question(question_id=str(i), question=row["question"], reference=row["reference"]) for i, row in enumerate(questions)
    )
    assert asked.isdisjoint(run for text in [*lectures.values(), *(pair["answer"] for pair in pairs)] for run in runs(text))
