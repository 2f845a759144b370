"""The offline judge: how it splits, what it counts as covered, and that order and machine cannot change its word."""

import numpy as np
import pytest

from ray_jobs.core.models import resolve_model
from ray_jobs.core.records import OFFLINE
from ray_jobs.judging.by_coverage import GAMES_PER_BATCH, judge_by_coverage
from ray_jobs.judging.coverage import Coverage, CoverageJudge, compare, cover, rubric_sha, statements
from ray_jobs.judging.encoder import SentenceEncoder
from ray_jobs.judging.pairs import Game, Ruling, verdict_row

REFERENCE = "The base register holds the start address. The limit register holds the length. Each access is checked by hardware."
VOCABULARY = sorted(set(REFERENCE.lower().replace(".", "").split()) | {"cats", "sleep", "all", "day"})


def bag_of_words(texts):
    """An encoder whose cosines can be read off: unit counts over a fixed vocabulary."""
    counts = np.array([[text.lower().replace(".", "").split().count(word) for word in VOCABULARY] for text in texts], dtype=np.float32)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def game(text_a, text_b, *, reference=REFERENCE, swapped=False, **changes):
    fields = {
        "question_id": "q",
        "question": "?",
        "reference": reference,
        "model_a": "base",
        "model_b": "teacher",
        "answer_a": "1",
        "answer_b": "2",
        "text_a": text_a,
        "text_b": text_b,
        "error_a": "",
        "error_b": "",
        "swapped": swapped,
    }
    return Game(**fields | changes)


@pytest.fixture
def judge():
    return CoverageJudge(bag_of_words, threshold=0.6, margin=0.05)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One fact is here. Another fact is there!", ["One fact is here.", "Another fact is there!"]),
        ("Use caches, e.g. TLBs, in hardware. They hide latency.", ["Use caches, e.g. TLBs, in hardware.", "They hide latency."]),
        ("Das gilt z. B. Für Seiten. Der Rest bleibt gleich.", ["Das gilt z. B. Für Seiten.", "Der Rest bleibt gleich."]),
        ("A page has 4.5 kB of data. It is moved whole.", ["A page has 4.5 kB of data.", "It is moved whole."]),
        (
            "Advantages are these:\n- it is very fast\n- it is quite cheap",
            ["Advantages are these:", "it is very fast", "it is quite cheap"],
        ),
        ("1. It saves memory space\n2. It saves much time", ["It saves memory space", "It saves much time"]),
        (
            "It has (a) base registers here and (b) limit registers there",
            ["It has (a) base registers here and", "(b) limit registers there"],
        ),
        ("Reads are cheap here; writes are costly there.", ["Reads are cheap here", "writes are costly there."]),
        ("Yes. It is needed for protection.", ["Yes. It is needed for protection."]),
        ("No", ["No"]),
        ("  \n ", []),
        ("- ", ["-"]),
    ],
)
def test_statements(text, expected):
    assert statements(text) == expected


def test_statements_lose_no_word():
    text = "First: the kernel (ring 0) runs. Then e.g. drivers; they may crash. Ok. 3) The end of it comes now."
    kept = " ".join(statements(text)).split()
    assert [word for word in text.replace(";", "").split() if word != "3)"] == [word for word in kept if word != "3)"]


def test_a_statement_is_covered_by_its_best_sentence():
    said = bag_of_words(["The base register holds the start address", "Each access is checked by hardware"])
    found = cover(said, bag_of_words(["The limit register holds the length", "Each access is checked"]), threshold=0.8)
    assert found.best_S == pytest.approx([6 / np.sqrt(9 * 8), 4 / np.sqrt(4 * 6)], abs=1e-6)
    assert found.covered_S.tolist() == [False, True]


def test_score_is_the_mean_of_soft_and_hard():
    found = Coverage(np.array([0.9, -0.2, 0.5], dtype=np.float32), np.array([True, False, False]))
    assert found.score == pytest.approx(((0.9 + 0 + 0.5) / 3 + 1 / 3) / 2)


def test_margin_makes_a_tie():
    one, two = (Coverage(np.array([x], dtype=np.float32), np.array([True])) for x in (0.90, 0.82))
    assert compare(one, two, margin=0.05) == "tie"
    assert compare(one, two, margin=0.03) == "a"
    assert compare(two, one, margin=0.03) == "b"


def test_the_answer_that_covers_more_wins_and_the_explanation_says_why(judge):
    full = "The base register holds the start address. The limit register holds the length."
    [ruling] = judge.judge([game(full, "Each access is checked by hardware. Cats sleep all day.")])
    assert ruling.winner == "a"
    first, *rest = ruling.explanation.split("\n")
    assert "Of 3 statements in the sample answer, answer 1 covers 2" in first and "answer 2 covers 1" in first
    assert rest == [
        "Only answer 1 covers: “The base register holds the start address.” · “The limit register holds the length.”",
        "Only answer 2 covers: “Each access is checked by hardware.”",
    ]


def test_what_both_miss_is_named(judge):
    [ruling] = judge.judge([game("Each access is checked by hardware.", "Each access is checked.")])
    assert "Both cover: “Each access is checked by hardware.”" in ruling.explanation
    assert "Missing from both: “The base register holds the start address.”" in ruling.explanation


def test_both_orders_agree(judge):
    texts = ["Each access is checked.", "Cats sleep all day.", REFERENCE, "The limit register holds the length", "Access by hardware"]
    for a in texts:
        for b in texts:
            straight, swapped = judge.judge([game(a, b), game(a, b, swapped=True)])
            assert straight == swapped


def test_exchanging_the_models_exchanges_the_winner(judge):
    one, two = judge.judge([game("Each access is checked.", "Cats sleep."), game("Cats sleep.", "Each access is checked.")])
    assert (one.winner, two.winner) == ("a", "b")


def test_it_is_deterministic_and_independent_of_its_batch(judge):
    games = [game("Each access is checked.", text) for text in ("Cats sleep.", "The length", REFERENCE)]
    assert judge.judge(games) == [judge.judge([one])[0] for one in games]


def test_rules_need_no_encoder():
    def refuse(texts):
        raise AssertionError(f"encoded {texts}")

    judge = CoverageJudge(refuse, threshold=0.6, margin=0.05)
    games = [game("same", " same "), game("", ""), game("", "x"), game("x", " "), game("x", "y", error_b="out of memory")]
    rulings = judge.judge(games)
    assert [ruling.winner for ruling in rulings] == ["tie", "tie", "b", "a", None]
    assert rulings[4].unscored == "answer 2 (teacher) failed: out of memory"


def test_settings_change_the_rubric():
    base = rubric_sha("minilm-l6", threshold=0.6, margin=0.05)
    others = [("other", 0.6, 0.05), ("minilm-l6", 0.5, 0.05), ("minilm-l6", 0.6, 0.1)]
    assert base not in {rubric_sha(model, threshold=t, margin=m) for model, t, m in others}


@pytest.fixture(scope="module")
def minilm():
    return SentenceEncoder(resolve_model("minilm-l6"))


def test_minilm_gives_unit_vectors_and_batching_changes_nothing(minilm):
    texts = ["The limit register holds the length.", "A short one.", "Speicher wird in Seiten geteilt. " * 20]
    together = minilm(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(minilm([text])[0], row, atol=1e-5)
    assert minilm([]).shape == (0, 384)


def test_minilm_hears_a_paraphrase(minilm):
    judge = CoverageJudge(minilm, threshold=0.6, margin=0.05)
    paraphrase = "The base register contains the address where the program begins, and the limit register its size."
    [ruling] = judge.judge([game("Big data is stored on many cheap machines.", paraphrase)])
    assert ruling.winner == "b"
    assert "Only answer 2 covers: “The base register holds the start address.”" in ruling.explanation


def test_batches_that_finish_out_of_turn_are_put_in_order():
    games = [game("Each access is checked.", f"Answer {i}")._replace(question_id=f"q{i}") for i in range(GAMES_PER_BATCH + 2)]
    seen = []

    def last_first(batches):
        for batch in reversed(batches):
            yield {"verdicts": [verdict_row(Game(**row), Ruling("tie"), judge=OFFLINE, rubric_sha="x") for row in batch["games"]]}

    judged = judge_by_coverage(games, model="minilm-l6", work=last_first, on_progress=lambda *told: seen.append(told))
    assert [row["question_id"] for row in judged.rows] == [each.question_id for each in games]
    assert seen == [(2, len(games), ""), (len(games), len(games), "")] and judged.facts["rubric_sha"] == "x"
