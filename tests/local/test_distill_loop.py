"""Distillation on the one training loop, in one process, on a tiny model."""

import itertools

import pytest
import torch
from packed_rows import write_rows

from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.student import build_student
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.batches import PackedRows, Row, collate
from ray_jobs.training.loop import evaluate, train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13)]


@pytest.fixture
def rows(tmp_path):
    return PackedRows(write_rows(tmp_path / "rows", SEGMENTS))


def distil(tiny_model, rows, *, student=None, kd_weight=0.9, ce_weight=0.1, **changes):
    torch.manual_seed(0)
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = student or build_student(teacher, [0, 3])
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(temperature=2.0), kd_weight=kd_weight, ce_weight=ce_weight)
    recipe = Recipe(**{"max_steps": 8, "learning_rate": 3e-3, "global_batch_size": 4, "dtype": "float32"} | changes)
    return student, train(student, loss, rows, eval_rows=rows, recipe=recipe)


def test_divergence_falls_and_terms_are_logged_apart(tiny_model, rows):
    _, progress = distil(tiny_model, rows, max_steps=20, kd_weight=1.0, ce_weight=0.0)
    before, after = progress.eval_before["terms"], progress.eval_after["terms"]
    assert after["kl"] < 0.7 * before["kl"]
    assert before["ce_teacher"] == after["ce_teacher"]
    steps = [line for line in progress.log if "loss" in line]
    assert all(line["terms"].keys() == {"kl", "ce"} for line in steps)


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_model, rows):
    _, progress = distil(tiny_model, rows, max_steps=2)
    for line in (line for line in progress.log if "loss" in line):
        assert line["loss"] == pytest.approx(0.9 * line["terms"]["kl"] + 0.1 * line["terms"]["ce"], rel=1e-5)


def test_a_student_of_all_layers_has_nothing_to_learn(tiny_model, rows):
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = build_student(teacher, [0, 1, 2, 3])
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(temperature=2.0), kd_weight=1.0, ce_weight=0.0)
    terms = evaluate(student, loss, rows)["terms"]
    assert terms["kl"] < 1e-6
    assert terms["ce"] == pytest.approx(terms["ce_teacher"], rel=1e-5)
    assert terms["ce_teacher"] == pytest.approx(evaluate(teacher, cross_entropy_loss, rows)["loss"], rel=1e-5)


def test_splitting_a_step_changes_nothing(tiny_model, rows):
    whole, split = (distil(tiny_model, rows, micro_batch_size=size, max_steps=3)[0] for size in (4, 1))
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def segments(rows):
    """Every example as a row of its own."""
    for row in (rows[index] for index in range(len(rows))):
        starts = [*(int(place) for place in (row.position_ids == 0).nonzero()[0]), len(row.input_ids)]
        for one, next_one in itertools.pairwise(starts):
            yield Row(*(values[one:next_one] for values in row))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "total_variation"])
def test_gradients_are_equal_split_packed_or_padded(tiny_model, rows, kind):
    torch.manual_seed(0)
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = build_student(teacher, [0, 3])
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(kind, temperature=2.0), kd_weight=0.9, ce_weight=0.1)
    packed = [rows[index] for index in range(len(rows))]
    ways = [[collate(packed)], [collate([row]) for row in packed], [collate(list(segments(rows)))]]
    found = []
    for batches in ways:
        student.zero_grad()
        for batch in batches:
            loss(student, batch).total.backward()
        found.append([parameter.grad.clone() for parameter in student.parameters()])
    for whole, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)
