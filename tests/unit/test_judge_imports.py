"""People's labels and another tool's scores as one more judge: read, turned to the run's pairs, or refused with the line."""

import json

import pytest

from ray_jobs.core.errors import DataError
from ray_jobs.core.records import Verdict
from ray_jobs.judging.imports import read_import
from ray_jobs.judging.pairs import make_games
from ray_jobs.judging.results import describe_judge

QUESTIONS = [{"question_id": f"q{n}", "question": "?", "reference": "!"} for n in range(4)]
ANSWERS = {
    model: [{"answer_id": f"{model}{n}", "question_id": f"q{n}", "model": model, "text": model, "finish_reason": "stop"} for n in range(4)]
    for model in ("base", "teacher", "student")
}
GAMES = make_games(QUESTIONS, ANSWERS, [("base", "teacher"), ("teacher", "student")])


def imported(text, *, name="labels.csv", judge="human"):
    return read_import(text.encode(), name=name, judge=judge, games=GAMES)


def winners(found):
    return {(row["question_id"], row["model_a"], row["model_b"]): row["winner"] for row in found.rows}


def test_labels_of_a_csv_are_turned_to_the_pairs_of_the_run():
    found = imported(
        "\ufeffQuestion_ID,model_1,model_2,winner,explanation\r\n"
        'q0,base,teacher,2,"größer, und\nrichtig"\r\nq1,teacher,base,a,\r\nq2,base,teacher,tie,\r\nq3,base,teacher,,\r\n'
        "q3,student,teacher,student,\r\n"
    )
    assert winners(found) == {
        ("q0", "base", "teacher"): "b",
        ("q1", "base", "teacher"): "b",
        ("q2", "base", "teacher"): "tie",
        ("q3", "teacher", "student"): "b",
    }
    assert Verdict(**found.rows[0]).explanation == "größer, und\nrichtig"
    assert {row["judge"] for row in found.rows} == {"human"}
    assert found.facts.items() >= {"kind": "labels", "lines": 5, "labelled": 4, "annotators": 1}.items()
    assert found.facts["annotator_agreement"] is None


def test_several_annotators_make_a_majority_and_their_agreement_is_told():
    votes = {"ann": "aab", "bob": "aba", "cyd": "bab"}
    lines = [
        {"question_id": f"q{n}", "model_a": "base", "model_b": "teacher", "winner": vote, "annotator": name}
        for name, said in votes.items()
        for n, vote in enumerate(said)
    ]
    found = imported("\n".join(map(json.dumps, lines)), name="labels.jsonl")
    assert list(winners(found).values()) == ["a", "a", "b"]
    assert found.rows[0]["explanation"] == "3 labels: 2 for answer 1, 1 for answer 2"
    assert found.facts["annotators"] == 3 and found.facts["annotator_agreement"]["num"] == 3
    assert found.facts["annotator_agreement"]["alpha"] < 0.2


def test_two_annotators_who_differ_make_a_tie():
    assert list(winners(imported("question_id,model_a,model_b,winner\nq0,base,teacher,a\nq0,base,teacher,b\n")).values()) == ["tie"]


def test_a_text_that_cannot_be_written_is_mended_as_a_reply_is():
    line = {"question_id": "q0", "model_a": "base", "model_b": "teacher", "winner": "a", "explanation": "half \ud800\u2028an emoji"}
    text = json.dumps(line).replace(r"\u2028", "\u2028")  # a line separator may stand in JSON as it is
    found = imported(text, name="labels.jsonl")
    assert found.rows[0]["explanation"] == "half ?\u2028an emoji"
    assert found.rows[0]["explanation"].encode()


def test_a_spreadsheet_that_separates_by_semicolon_is_read():
    found = imported("question_id;model_a;model_b;winner;explanation\r\nq0;base;teacher;a;kurz, aber richtig\r\n")
    assert winners(found) == {("q0", "base", "teacher"): "a"} and found.rows[0]["explanation"] == "kurz, aber richtig"


def test_scores_of_another_tool_let_the_higher_mean_win():
    lines = [
        {"sample_id": "q0", "model": "base", "value": "C", "epoch": 1},
        {"sample_id": "q0", "model": "base", "value": "I", "epoch": 2},
        {"sample_id": "q0", "model": "teacher", "value": "P"},
        {"sample_id": "q1", "model": "base", "value": 0.25},
        {"sample_id": "q1", "model": "teacher", "value": True},
        {"sample_id": "q2", "model": "base", "value": 1},
    ]
    found = imported("\n".join(map(json.dumps, lines)), name="scores.jsonl", judge="inspect")
    assert winners(found) == {("q0", "base", "teacher"): "tie", ("q1", "base", "teacher"): "b"}
    assert found.rows[1]["explanation"] == "Answer 1 scores 0.25, answer 2 1."
    assert found.facts.items() >= {"kind": "scores", "labelled": 2, "scores": 6}.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question_id,model_a,model_b,winner\nq9,base,teacher,a\n", r"line 2: question_id 'q9' is none of the run's 4 questions"),
        ("question_id,model_a,model_b,winner\nq0,base,gpt,a\n", r"line 2: models 'base' and 'gpt' do not meet.*base against teacher"),
        ("question_id,model_a,model_b,winner\nq0,base,student,a\n", "'base' and 'student' do not meet"),
        ("question_id,model_a,model_b,winner\nq0,base,teacher,better\n", r"line 2: winner 'better' was not offered"),
        ("question_id,model_a,model_b,winner,answer_b\nq0,base,teacher,a,old\n", r"answer 'old' is no more.*'teacher0'; label it anew"),
        (
            "question_id,model_a,model_b,winner,annotator\nq0,base,teacher,a,ann\nq0,teacher,base,a,ann\n",
            r"line 3: annotator 'ann' labels question 'q0' a second time",
        ),
        ("question_id,model,value\nq0,gpt,1\n", "model 'gpt' does not meet another.*base, student, teacher"),
        ("question_id,model,value\nq0,base,good\n", "value 'good' is no score"),
        ("question_id,model,value\nq0,base,nan\n", "value 'nan' is no score"),
        ("question_id,model_a,model_b,winner\n", "no row in it"),
        ("question,verdict\nq0,a\n", r"no verdict in its columns \(question, verdict\); give rows with question_id, model_a"),
        ("question_id,winner\nq0,a\n", "models '' and '' do not meet"),
        (f"question_id,winner,explanation\nq0,a,{'x' * 200_000}\n", r"labels.csv after line 1: no CSV \(field larger"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_with_its_line(text, message):
    with pytest.raises(DataError, match=message) as refused:
        imported(text)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "not UTF-8"), (b"[1]", "line 1: no JSON object"), (b"{", "line 1: no JSON"), (b"[" * 100_000, "line 1: no JSON")],
)
def test_files_that_cannot_be_read(content, message):
    with pytest.raises(DataError, match=message):
        read_import(content, name="labels.jsonl", judge="human", games=GAMES)


def test_people_calibrate_every_other_judge():
    labels = imported("question_id,model_a,model_b,winner\n" + "".join(f"q{n},base,teacher,{'ab'[n % 2]}\n" for n in range(4)))
    judged = [{**row, "judge": "openai:x"} for row in labels.rows]
    card = describe_judge([*judged, *labels.rows], "openai:x", [], seed=0, human="human")
    assert (card["human"]["num"], card["human"]["kappa"]) == (4, 1.0)
