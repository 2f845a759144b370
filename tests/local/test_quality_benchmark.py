"""A row of the decoder's quality table on a tiny model: students of the same tokens, and no held-out token among them."""

from argparse import Namespace

import pytest

from benchmarks import distillation_quality as quality
from benchmarks.quality_rows import write_text_rows
from ray_jobs.training.batches import PackedRows

OPTIONS = {"layers": 2, "steps": 2, "length": 32, "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3, "eval_rows": 2}


@pytest.fixture
def wikitext(tmp_path):
    for name, word in (("valid.txt", "taught"), ("test.txt", "hidden")):
        (tmp_path / name).write_text(" ".join(f"{word} {number}" for number in range(60)))
    return tmp_path


def test_training_rows_are_half_of_the_course_and_hold_nothing_of_what_is_held_out(tiny_model, wikitext):
    found = write_text_rows(wikitext, tiny_model, wikitext=wikitext, length=32, num_train=6, num_eval=3)
    train, *held_out = ({tuple(rows[index].input_ids) for index in range(len(rows))} for rows in map(PackedRows, found))
    assert len(train) == 6 and [len(rows) for rows in held_out] == [3, 3]
    assert all(train.isdisjoint(rows) for rows in held_out)
    more = write_text_rows(wikitext, tiny_model, wikitext=wikitext, length=32, num_train=10**5, num_eval=3)
    assert 6 < len(PackedRows(more.train)) < 10**5


@pytest.mark.parametrize("row", ["influence-cut", "ce-only", "random"])
def test_a_row_measures_its_student_on_both_texts(tiny_model, wikitext, tmp_path, row):
    options = Namespace(**OPTIONS, model=str(tiny_model), wikitext=wikitext, dtype="float32", device="cpu", seed=0, threads=1)
    found = quality.measure(row, options, tmp_path)
    assert found["num_parameters"]["student"] < found["num_parameters"]["teacher"]
    assert found["wikitext"]["perplexity"] > 1 and found["course"]["kl_nats"] > 0
    assert len(found["layers"]) == 2 and min(found["speed"].values()) > 0
