"""The evaluation's benchmarks read their data as it is published, and simulated judges have the habits planted in them."""

import json

import numpy as np
import pytest

from benchmarks.judge_statistics import JUDGES, Habits, estimates, pandalm, play
from benchmarks.similarity import ranks_grades, read

XML = """<question id="1" module="M"><questionText>Why{mark}?</questionText>
<referenceAnswers><referenceAnswer id="r"> Because. </referenceAnswer></referenceAnswers>
<studentAnswers><studentAnswer id="s"><response> So. </response><score>0.5</score></studentAnswer>
<studentAnswer id="t"><response> </response><score>0</score></studentAnswer></studentAnswers></question>"""


def test_questions_that_share_an_id_stay_apart_and_splits_come_together(tmp_path):
    for split, name, mark in (("training", "a", ""), ("unseen_answers", "a", ""), ("training", "b", " not")):
        folder = tmp_path / split / "english"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.xml").write_text(XML.format(mark=mark))
    questions, answers = read(tmp_path, "english")
    assert [row["question_id"] for row in questions] == ["Why?", "Why not?"]
    assert [(row["text"], row["grade"]) for row in answers] == [("So.", 0.5)] * 3


def test_grades_are_ranked_within_a_question_and_equal_values_are_half_right():
    rows = [("q", 1.0, 0.9), ("q", 0.5, 0.4), ("q", 0.0, 0.4), ("p", 0.0, 0.99)]
    answers = [{"answer_id": str(i), "question_id": q, "grade": grade} for i, (q, grade, _) in enumerate(rows)]
    rate = ranks_grades({str(i): value for i, (_, _, value) in enumerate(rows)}, answers)
    assert rate.value == pytest.approx(2.5 / 3)


def test_planted_habits_show_in_the_figures():
    found = {}
    for name, habits in {**JUDGES, "only the place": Habits(0.0, 9.0, 0.0, 0.0)}.items():
        estimated = estimates(play(habits, 3000, np.random.default_rng(0)), seed=0)
        found[name] = {what: figure for what, (figure, _, _) in estimated.items()}
    assert found["first place"]["first position rate"] > 0.6 > found["fair"]["first position rate"] + 0.05
    assert found["length"]["longer rate"] > found["fair"]["longer rate"] + 0.1
    assert found["place, length and ties"]["tie rate"] == pytest.approx(0.3, abs=0.02)
    assert found["only the place"]["position consistency"] < 0.02 < 0.98 < found["only the place"]["repeat stability"]


def test_pandalms_files_are_read_with_replies_that_say_nothing(tmp_path):
    pairs = [
        {"idx": str(i), "instruction": "do", "input": str(i), "response1": True, "response2": "two words"}
        | {f"annotator{k}": label for k in (1, 2, 3)}
        for i, label in enumerate("12012")
    ]
    replies = [{"idx": str(i), "gpt_result": said} for i, said in enumerate(["1", "2", "Tie", "garbage", "2"])]
    (tmp_path / "testset-v1.json").write_text(json.dumps(pairs))
    (tmp_path / "gpt-3.5-turbo-testset-v1.json").write_text(json.dumps(replies))
    told = pandalm(tmp_path)
    assert "majorities: tie 1, a 2, b 2" in told
    assert "| gpt-3.5-turbo and the majority | 4 | 100.0% | 1.00" in told
