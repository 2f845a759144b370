"""Both orders of each pair, what needs no judge, and two games -> one result."""

import numpy as np
import pytest

from ray_jobs.core.errors import DataError
from ray_jobs.core.records import Verdict
from ray_jobs.judging.pairs import Ruling, make_games, pair_results, settle, verdict_row
from ray_jobs.judging.results import compare_models, metric_winners, pair_headline


def question(number):
    return {"question_id": f"q{number}", "question": f"Question {number}?", "reference": f"Sample {number}."}


def answer(model, number, text="text", *, finish_reason="stop", error=""):
    row = {"answer_id": f"{model}-{number}", "question_id": f"q{number}", "model": model, "text": f"{model} {text}"}
    return {**row, "finish_reason": finish_reason, "error": error}


QUESTIONS = [question(n) for n in range(3)]
ANSWERS = {model: [answer(model, n) for n in range(3)] for model in ("base", "teacher", "student")}


def verdicts(*winners, judge="coverage", number=0):
    games = make_games(QUESTIONS, ANSWERS, [("base", "teacher")])[2 * number : 2 * number + 2]
    rulings = [w if isinstance(w, Ruling) else Ruling(w, f"because {w}") for w in winners]
    return [verdict_row(game, ruling, judge=judge, rubric_sha="r") for game, ruling in zip(games, rulings, strict=True)]


def test_every_pair_meets_in_both_orders_question_by_question():
    games = make_games(QUESTIONS, ANSWERS, [("base", "teacher"), ("teacher", "student")])
    assert len(games) == 3 * 2 * 2
    assert [(g.question_id, g.model_a, g.model_b, g.swapped) for g in games[:4]] == [
        ("q0", "base", "teacher", False),
        ("q0", "base", "teacher", True),
        ("q0", "teacher", "student", False),
        ("q0", "teacher", "student", True),
    ]


def test_a_swapped_game_shows_the_second_model_first_and_names_the_winner_by_side():
    straight, swapped = make_games(QUESTIONS, ANSWERS, [("base", "teacher")])[:2]
    assert straight.shown == ("base text", "teacher text")
    assert swapped.shown == ("teacher text", "base text")
    assert (straight.side("a"), swapped.side("a"), swapped.side("b"), swapped.side("tie")) == ("a", "b", "a", "tie")


@pytest.mark.parametrize("rows", [ANSWERS["teacher"][:2], [*ANSWERS["teacher"], answer("teacher", 9)]])
def test_answers_and_questions_must_belong_together(rows):
    with pytest.raises(DataError, match=r"answers of 'teacher' and the questions do not belong together \(1 of them"):
        make_games(QUESTIONS, {**ANSWERS, "teacher": rows}, [("base", "teacher")])


def test_a_failed_answer_is_unscored_and_not_a_loss():
    failed = [answer("teacher", n, finish_reason="error", error="out of memory") for n in range(3)]
    game = make_games(QUESTIONS, {**ANSWERS, "teacher": failed}, [("base", "teacher")])[0]
    assert settle(game) == Ruling(None, unscored="answer 2 (teacher) failed: out of memory")


@pytest.mark.parametrize(
    ("texts", "winner", "said"),
    [
        (("\u200b", "Paging."), "b", "Answer 1 is empty."),
        (("Paging.", "\ufeff \u2060"), "a", "Answer 2 is empty."),
        (("\u200b\u00ad\u2066\u3164", ""), "tie", "Both answers are empty."),
        (("Pag\u200bing.", "Paging."), "tie", "Both answers are identical."),
    ],
)
def test_what_a_judge_would_be_shown_as_empty_or_identical_is_settled_by_rule(texts, winner, said):
    game = make_games(QUESTIONS, ANSWERS, [("base", "teacher")])[0]
    assert settle(game._replace(text_a=texts[0], text_b=texts[1])) == Ruling(winner, said)


def test_two_orders_that_agree_make_the_result():
    [result] = pair_results(verdicts("b", "b"), "coverage")
    assert (result.winner, result.consistent, result.explanation) == ("b", True, "because b")


@pytest.mark.parametrize("winners", [("a", "b"), ("a", "tie"), ("tie", "b")])
def test_two_orders_that_disagree_count_as_a_tie_and_say_so(winners):
    [result] = pair_results(verdicts(*winners), "coverage")
    assert (result.winner, result.consistent) == ("tie", False)
    assert result.explanation.startswith("The verdict depends on the order")
    assert f"[answer 2 read first] because {winners[1]}" in result.explanation


def asked(*orders):
    """Rows of a judge whose repeats in each order said these winners."""
    rows = [(*verdicts(*winners), repeat) for repeat, winners in enumerate(zip(*orders, strict=True))]
    return [row | {"repeat": repeat} for *pair, repeat in rows for row in pair]


def test_repeats_are_a_majority_in_each_order_so_that_asking_more_often_makes_no_more_ties():
    [result] = pair_results(asked(["a", "b", "a"], ["a", "a", "tie"]), "coverage")
    assert (result.winner, result.consistent, result.explanation) == ("a", True, "because a")
    [by_order] = pair_results(asked(["a", "b", "a"], ["b", "b", "a"]), "coverage")
    [by_chance] = pair_results(asked(["a", "b"], ["a", "b"]), "coverage")
    assert (by_order.winner, by_order.consistent) == (by_chance.winner, by_chance.consistent) == ("tie", False)
    assert "is not the same each time" in by_chance.explanation
    unheard = Ruling(None, unscored="no reply")
    [heard] = pair_results(asked([unheard, "b", unheard], ["b", "b", "a"]), "coverage")
    assert heard.winner == "b"


def test_more_repeats_of_a_noisy_judge_decide_more_questions():
    generator = np.random.default_rng(0)

    def decided(repeats):
        said = generator.choice(["a", "b"], (60, 2, repeats), p=[0.85, 0.15]).tolist()
        return sum(pair_results(asked(*orders), "coverage")[0].winner == "a" for orders in said)

    assert decided(9) > decided(1)


def test_one_unscored_order_leaves_the_pair_unscored():
    [result] = pair_results(verdicts("a", Ruling(None, unscored="no reply: 500")), "coverage")
    assert (result.winner, result.unscored) == (None, "no reply: 500")


def test_results_are_of_one_judge_and_totals_add_up():
    rows = verdicts("a", "a") + verdicts("b", "b", number=1) + verdicts("tie", "tie", number=2) + verdicts("b", "b", judge="openai:x")
    results = pair_results(rows, "coverage")
    assert [result.winner for result in results] == ["a", "b", "tie"]
    assert [result.winner for result in pair_results(rows, "openai:x")] == ["b"]


def test_rows_are_verdicts_with_ids_of_their_content():
    straight, swapped = verdicts("a", "a")
    assert Verdict(**straight).swapped is False and Verdict(**swapped).swapped is True
    assert straight["verdict_id"] != swapped["verdict_id"]
    assert straight["verdict_id"] == verdicts("b", "b")[0]["verdict_id"]


def similarity(model, number, cosine):
    return {"model": model, "question_id": f"q{number}", "cosine": cosine, "num_tokens": 40}


def test_the_comparison_counts_every_question_once():
    rows = verdicts("a", "a") + verdicts("b", "a", number=1) + verdicts("b", "b", number=2)
    scores = [similarity("base", n, x) for n, x in enumerate((0.9, 0.9, None))]
    scores += [similarity("teacher", n, x) for n, x in enumerate((0.8, 0.9, 0.7))]
    [entry] = compare_models([("base", "teacher")], ["coverage"], rows, scores, tie_bands={"cosine": 0.01}, seed=0)
    by_coverage, by_similarity = entry["win_rates"]["coverage"], entry["win_rates"]["similarity"]
    assert [by_coverage[key] for key in ("wins_a", "wins_b", "ties", "unscored", "inconsistent")] == [1, 1, 1, 0, 1]
    assert [by_similarity[key] for key in ("wins_a", "wins_b", "ties", "unscored")] == [1, 0, 1, 1]
    agreed = entry["agreement_with_similarity"]["coverage"]
    assert (agreed["num"], agreed["share"], agreed["kappa"]) == (2, 1.0, 1.0)
    assert pair_headline(entry).startswith(
        "base vs teacher: coverage 1:1 (1 tie, p = 1); similarity 1:0 (1 tie, 1 unscored, p = 1); agreement"
    )


def test_an_answer_that_failed_is_no_short_answer():
    scores = [similarity("base", 0, 0.9), similarity("teacher", 0, None) | {"num_tokens": 0, "reason": "answer failed: out of memory"}]
    scores += [similarity("base", 1, 0.9), similarity("teacher", 1, None) | {"num_tokens": 0, "reason": "empty answer"}]
    assert metric_winners(scores, "base", "teacher", column="num_tokens", tie_band=0.0) == {"q0": None, "q1": "a"}
