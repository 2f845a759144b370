"""The first sentence: it claims what the test shows, and names what speaks against it."""

import pytest

from ray_jobs.reporting.answer import answer_sentence, coverage_sentences, leading_judge, speaking_matches
from ray_jobs.reporting.findings import match_of

USABLE = {"word": "usable", "reasons": []}


def _match(wins_1, wins_2, ties=0, *, judge="openai:gpt-4", metric=None, pair=("base", "teacher")):
    winners = ["1"] * wins_1 + ["2"] * wins_2 + ["tie"] * ties
    return match_of(pair, judge, f"{judge} judge" if judge else "similarity", winners, metric=metric)


def _similarity(wins_1, wins_2):
    return _match(wins_1, wins_2, judge=None, metric="similarity")


def _judge(name, word="usable", questions=100):
    return {"judge": name, "card": {"num_questions": questions, "usability": {"word": word, "reasons": []}}}


def test_the_decks_contradiction_in_one_sentence():
    said = answer_sentence(_match(44, 56), _similarity(66, 34), USABLE)
    assert said == (
        "The fine-tuned model is not shown to be better than the base: openai:gpt-4 judge 56:44 (56\u202f% of the decided, interval "
        "46\u202f% to 66\u202f%), p = 0.27; a difference like this would show with about 560 questions; similarity leans the other way, "
        "34:66, p = 0.002."
    )


def test_ties_ask_for_more_questions_as_they_decide_nothing():
    assert "about 1,119 questions" in answer_sentence(_match(44, 56, 100), None, USABLE)


def test_questions_that_nobody_judged_ask_for_no_more():
    match = match_of(("base", "teacher"), "human", "people", ["1"] * 44 + ["2"] * 56 + ["unscored"] * 900)
    assert "about 560 questions" in answer_sentence(match, None, USABLE)


def test_similarity_is_named_where_it_shows_another_thing_and_else_left_out():
    assert "similarity" not in answer_sentence(_match(20, 60), _similarity(25, 55), USABLE)
    assert "by similarity it is better, 66:34, p = 0.002" in answer_sentence(_match(44, 56), _similarity(34, 66), USABLE)
    assert "similarity leans the other way, 40:45" in answer_sentence(_match(20, 60), _similarity(45, 40), USABLE)
    assert "similarity" not in answer_sentence(_match(20, 60), _similarity(0, 0), USABLE)


def test_a_weak_judge_is_named_where_it_finds_a_winner_and_an_unusable_one_finds_none():
    weak, unusable = {"word": "weak", "reasons": ["it forgets"]}, {"word": "unusable", "reasons": ["it calls 97% of the games a tie"]}
    assert answer_sentence(_match(20, 60), None, weak).endswith("p < 0.001; but the judge is weak (it forgets).")
    assert "weak" not in answer_sentence(_match(44, 56), None, weak)
    assert answer_sentence(_match(20, 60), None, unusable) == (
        "Whether the fine-tuned model is better than the base is not shown: the openai:gpt-4 judge is unusable "
        "(it calls 97% of the games a tie), so its 60:20 says nothing."
    )


@pytest.mark.parametrize(("wins", "said"), [((0, 0, 9), "0:0 with 9 ties, nothing was decided"), ((5, 5), "5:5 (50\u202f% of the decided")])
def test_nothing_decided_and_even_need_no_number_of_questions(wins, said):
    sentence = answer_sentence(_match(*wins), None, USABLE)
    assert said in sentence and "would show" not in sentence and sentence.count(": ") == 1


def test_the_most_usable_judge_leads_and_people_where_they_labelled_enough():
    coverage, model, jury = _judge("coverage"), _judge("openai:a", "weak"), _judge("jury")
    assert leading_judge([coverage, model]) == "coverage"
    assert leading_judge([coverage, _judge("openai:a")]) == "openai:a"
    assert leading_judge([coverage, _judge("openai:a"), jury]) == "jury"
    assert leading_judge([coverage, _judge("human", questions=30)]) == "human"
    assert leading_judge([coverage, _judge("human", questions=29)]) == "coverage"
    assert leading_judge([]) is None


def test_on_each_pair_the_first_judge_speaks_that_scored_it():
    judges = [_judge("coverage"), _judge("human", questions=40)]
    later = ("teacher", "student")
    rows = [_match(9, 8, judge="coverage"), _match(5, 6, judge="human")]
    rows += [_match(7, 7, judge="coverage", pair=later), _match(0, 0, judge="human", pair=later)]
    assert [row["judge"] for row in speaking_matches(rows, judges)] == ["human", "coverage"]
    assert speaking_matches([_similarity(1, 2)], []) == []


def test_a_stopped_judge_says_how_much_it_saw():
    whole, half = ({"judge": "openai:a", "pairs": 200, "not_asked": count} for count in (0, 76))
    assert coverage_sentences([whole]) == []
    assert coverage_sentences([half])[0].startswith("The openai:a judge was asked about 124 of 200 pairs of answers")
