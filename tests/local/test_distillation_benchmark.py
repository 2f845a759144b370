"""Contestants of the distillation benchmarks at a size of milliseconds; the peers' are compared in benchmarks/DISTILLATION.md."""

import pytest
import torch

from benchmarks import distillation_head, distillation_head_systems, distillation_inputs, distillation_step, distillation_step_ours
from benchmarks.turns import Contestant
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe

TINY = {"device": "cpu", "dtype": "float32", "threads": 1, "calls": 1, "vocabulary": 97, "student_width": 8, "teacher_width": 12}
STEP = {"device": "cpu", "dtype": "float32", "method": "full", "micro_batch_size": 1, "steps": 2, "learning_rate": 1e-3}


@pytest.mark.parametrize("cell", distillation_head.CELLS)
def test_head_of_a_cell_is_the_dense_divergence_of_its_inputs(cell):
    inputs = distillation_head_systems.draw_inputs({**distillation_head.CELLS[cell], **TINY, "positions": 40})
    valid_N = inputs.labels_N != -100
    assert valid_N.sum() == inputs.num_valid == (10 if cell == "quarter-frozen" else 40)
    log_q_NV = (inputs.student_NH[valid_N] @ inputs.student_head_VH.T).log_softmax(-1)
    log_p_NV = (inputs.teacher_NH[valid_N] @ inputs.teacher_head_VH.T).log_softmax(-1)
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    log_m_NV = ((1 - inputs.beta) * q_NV + inputs.beta * p_NV).log()
    dense = inputs.beta * (p_NV * (log_p_NV - log_m_NV)) + (1 - inputs.beta) * (q_NV * (log_q_NV - log_m_NV))
    if inputs.beta == 0:
        dense = p_NV * (log_p_NV - log_q_NV)
    (dense.sum() / inputs.num_valid).backward()
    norms = [float(tensor.grad.norm()) for tensor in (inputs.student_NH, inputs.student_head_VH) if tensor.requires_grad]
    meter = distillation_head_systems.Meter(torch.device("cpu"))
    found = distillation_head_systems.repetition(distillation_head_systems.raystill(inputs, "cpu"), inputs, meter, calls=2)
    assert found["loss"] == pytest.approx(float(dense.sum().detach()) / inputs.num_valid, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5, rel=1e-4)


def test_a_contestant_answers_each_time_it_is_asked():
    settings = {**distillation_head.CELLS["quarter-frozen"], **TINY, "positions": 40, "system": "bare"}
    contestant = Contestant(distillation_head.MODULE, settings, python=distillation_head.sys.executable)
    try:
        assert contestant.answer()["versions"]["torch"]
        assert contestant.ask().keys() == contestant.ask().keys() == {"cpu_s", "wall_s", "peak_bytes", "matrix_flops"}
    finally:
        contestant.stop()


def test_a_contestant_that_fails_ends_the_benchmark_with_its_error():
    contestant = Contestant(distillation_head.MODULE, {**TINY, "system": "bare"}, python=distillation_head.sys.executable)
    with pytest.raises(SystemExit, match="KeyError: 'positions'"):
        contestant.answer()
    contestant.stop()


def measured(system, folder, settings):
    rows, student = PackedRows(folder / "rows"), load_model(folder / "student", dtype=torch.float32)
    marks = distillation_inputs.Marks()
    recipe = Recipe(max_steps=2, global_batch_size=1, micro_batch_size=1, dtype="float32")
    run = distillation_step_ours.bare if system.startswith("bare") else distillation_step_ours.distil
    return {**run(student, {**settings, "system": system}, rows, recipe, marks), **marks.result()}


def test_step_contestants_measure_all_steps_but_the_first_and_epoch_2_only_reads(tmp_path):
    shapes = {"student_shape": "64x1", "teacher_shape": "128x1", "vocabulary": 97, "length": 32, "valid_share": 0.25}
    settings = {**STEP, **shapes, **{name: str(tmp_path / name) for name in ("student", "teacher", "rows", "cache")}}
    for name in ("student", "teacher"):
        distillation_inputs.write_model(tmp_path / name, shape=settings[f"{name}_shape"], vocabulary=97, length=32)
    distillation_inputs.write_rows(tmp_path / "rows", settings)
    rows = PackedRows(tmp_path / "rows")
    assert len(rows) == 2 and (rows[0].labels != -100).sum() == 8
    with pytest.raises(SystemExit, match="2 targets were missing"):
        measured("raystill-epoch2", tmp_path, {**settings, "cache": str(tmp_path / "empty")})
    found = {
        name: measured(name, tmp_path, settings)
        for name in (*distillation_step.SYSTEMS, distillation_step.CHECKPOINTING)
        if not name.startswith("trl")
    }
    for figures in found.values():
        assert len(figures["cpu_s"]) == len(figures["wall_s"]) == 1 and figures["peak_bytes"] > 0
    one, two = found["raystill-epoch1"], found["raystill-epoch2"]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-6) and len(one["losses"]) == 2
    assert one["targets_computed"] == two["targets_read"] == 2
