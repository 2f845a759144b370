"""The quality table shows each student beside the teacher, and says whether KD beats the labels alone."""

import pytest

from benchmarks import distillation_quality as quality
from benchmarks.quality_rows import cut


def run(row, *, wikitext, course=50.0):
    held_out = {
        name: {"perplexity": value, "teacher_perplexity": 20.0, "kl_nats": 0.5}
        for name, value in (("wikitext", wikitext), ("course", course))
    }
    numbers = {"num_parameters": {"student": 75_000_000, "teacher": 100_000_000}, "speed": {"student": 150.0, "teacher": 100.0}}
    return {"row": row, **held_out, **numbers}


def test_a_student_stands_beside_the_teacher_by_size_and_speed():
    teacher, student = quality.table([run("ce-only", wikitext=40.04)]).splitlines()[2:4]
    assert teacher == "| teacher | 100.0 | 1.00 | 20.0 | 0 | 20.0 | 0 |"
    assert student == "| ce-only: without KD: labels alone | 75.0 (75%) | 1.50 | 40.0 | 0.500 | 50.0 | 0.500 |"


@pytest.mark.parametrize(
    ("triple", "plain", "word"), [(30, 35, "beats"), (45, 41, "does not beat"), (30, 41, "in one of its two forms beats")]
)
def test_the_verdict_follows_from_equal_tokens(triple, plain, word):
    runs = [run("ce-only", wikitext=40.0), run("triple", wikitext=triple), run("without-hidden", wikitext=plain)]
    line, course = quality.verdict(runs)
    assert f"wikitext: KD {word} the labels alone" in line and "course: KD does not beat" in course
    assert quality.verdict(runs[:2]) == []


def test_each_row_differs_from_the_triple_loss_in_what_its_name_says():
    triple = quality.ROWS["triple"]
    changed = {
        row: {key for key in {**spec, **triple} if key != "what" and spec.get(key) != triple.get(key)} for row, spec in quality.ROWS.items()
    }
    assert changed["without-hidden"] == {"hidden_weight"} and changed["random"] == {"start"} and changed["influence"] == {"choose"}
    assert triple["kd_weight"] == 5.0 and triple["ce_weight"] == 2.0 and triple["hidden_weight"] == 1.0


def test_only_whole_rows_are_cut():
    assert cut(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]
