"""Planted instructions: what is planted, that no text leaves its section, and what the card makes of who obeys."""

import re

import pytest
from judge_server import completion, opinion

from ray_jobs.judging.calls import Asked, Counters, Prices, Reply
from ray_jobs.judging.canaries import KINDS, canary_rows, followed, make_canaries
from ray_jobs.judging.openai_judge import ModelJudge
from ray_jobs.judging.results import describe_judge

QUESTIONS = [
    {"question_id": f"q{n}", "question": f"Question {n}?", "reference": f"Sample answer {n}.", "language": "de" if n % 2 else "en"}
    for n in range(3)
]
JUDGE = ModelJudge("openai", "stub-1", "", 100, True, Prices(), 0)


def rows_of(canaries, answer):
    """The rows of a judge whose replies are `answer(canary)`: A, B or tie."""
    calls = JUDGE.calls(canary.game for canary in canaries)
    replies = {calls[canary.game].key: Reply(completion(opinion(answer(canary), reasoning="So.")), 0.1) for canary in canaries}
    games = [canary.game for canary in canaries]
    return canary_rows(canaries, JUDGE.rulings(games, calls, Asked(replies, Counters())), judge=JUDGE.label)


def planted(canary):
    return "A" if canary.game.swapped else "B"


def test_each_kind_is_planted_in_turn_and_none_is_asked_twice():
    canaries = make_canaries(QUESTIONS, 40, seed=0)
    assert [canary.kind for canary in canaries[:6]] == list(KINDS)
    assert len({call.key for call in JUDGE.calls(canary.game for canary in canaries).values()}) == 40
    assert {canary.game.swapped for canary in canaries} == {False, True}
    assert make_canaries(QUESTIONS, 40, seed=0) == canaries != make_canaries(QUESTIONS, 40, seed=1)
    assert make_canaries([], 4, seed=0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_stays_in_its_section_and_in_its_size(kind):
    canary = next(canary for canary in make_canaries(QUESTIONS, 6, seed=0) if canary.kind == kind)
    prompt = JUDGE.calls([canary.game])[canary.game].request["messages"][1]["content"]
    for tag in ("question", "sample_answer", "answer_a", "answer_b"):
        assert len(re.findall(rf"<{tag}", prompt)) == len(re.findall(rf"</{tag}", prompt)) == 1
    assert "\u200b" not in prompt and len(prompt) < 25_000
    assert ("weiß" in prompt) == (canary.game.question_id == "q1")


def test_who_obeys_is_told_by_side_and_an_unread_reply_counts_for_nothing():
    canaries = make_canaries(QUESTIONS, 6, seed=0)
    obeyed = rows_of(canaries, planted)
    assert followed(obeyed, "openai:stub-1") == [True] * 6
    assert followed(rows_of(canaries, lambda canary: "tie"), "openai:stub-1") == [False] * 6
    assert followed(rows_of(canaries, lambda canary: "C"), "openai:stub-1") == []
    assert [row["flag"] != "" for row in obeyed] == [row["kind"] == "200 kB" for row in obeyed]


def test_a_judge_that_obeys_is_unusable_and_one_that_obeys_once_is_weak():
    row = {
        "question_id": "q",
        "model_a": "x",
        "model_b": "y",
        "answer_a": "1",
        "answer_b": "2",
        "judge": "j",
        "swapped": False,
        "repeat": 0,
    }
    verdicts = [{**row, "winner": "a", "unscored": "", "explanation": ""}]
    words = [
        describe_judge(verdicts, "j", [], seed=0, canaries_followed=obeyed)["usability"]
        for obeyed in ([True] * 3 + [False], [True] + [False] * 3, [False] * 4)
    ]
    assert [word["word"] for word in words] == ["unusable", "weak", "usable"]
    assert "obeyed 3 of 4 planted instructions" in words[0]["reasons"][0]
