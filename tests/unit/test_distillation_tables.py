"""The distillation benchmarks compare only equal work, take ratios within a turn, and say whether an aim is met."""

from argparse import Namespace

import pytest

from benchmarks import distillation_head as head
from benchmarks import distillation_step as step


def head_run(system, turn, *, cpu_s, mib=100, cell="quarter-frozen", timed=True, **values):
    facts = {"system": system, "cell": cell, "turn": str(turn), "timed": timed, "device": "cpu", "dtype": "float32"}
    shape = {"positions": 1024, "valid_share": 0.25, "trained_head": False, "vocabulary": 100, "student_width": 8, "teacher_width": 16}
    found = {"cpu_s": cpu_s, "wall_s": 9.0, "peak_bytes": mib * 2**20, "matrix_flops": None}
    return {**facts, **shape, **found, **({} if system == "bare" else {"loss": 2.0, "grad_norm": 0.5}), **values}


def step_run(system, turn, *, cpu_s, mib=100, loss=2.0):
    facts = {"system": system, "cell": "full-all", "turn": str(turn), "device": "cpu", "dtype": "float32", "load": 1.0}
    return {
        **{**facts, "micro_batch_size": 1, "length": 512, "cpu_s": cpu_s, "wall_s": cpu_s, "peak_bytes": mib * 2**20},
        **({} if system.startswith("bare") else {"losses": [loss, 9.0], "grad_norms": [0.5, 9.0]}),
    }


def test_heads_with_another_loss_or_gradient_are_refused():
    same = [head_run("raystill", 1, cpu_s=1.0), head_run("trl-dense", 1, cpu_s=1.0, loss=2.00001), head_run("bare", 1, cpu_s=1.0)]
    head.refuse_other_work(same)
    with pytest.raises(SystemExit, match="loss of quarter-frozen"):
        head.refuse_other_work([*same, head_run("liger-chunked", 1, cpu_s=1.0, loss=2.001)])
    with pytest.raises(SystemExit, match="grad_norm of quarter-frozen"):
        head.refuse_other_work([*same, head_run("torchtune", 1, cpu_s=1.0, loss=12.0, grad_norm=0.501)])


def test_torchtunes_loss_may_lack_the_teachers_entropy_and_bfloat16_rounds():
    head.refuse_other_work([head_run("raystill", 1, cpu_s=1.0), head_run("torchtune", 1, cpu_s=1.0, loss=12.0)])
    rounded = [head_run("raystill", 1, cpu_s=1.0), head_run("trl-dense", 1, cpu_s=1.0, loss=2.01)]
    head.refuse_other_work([{**run, "dtype": "bfloat16"} for run in rounded])


def test_head_ratios_are_of_one_turn_and_the_warm_up_does_not_count():
    ours = [head_run("raystill", 0, cpu_s=50.0, timed=False), *(head_run("raystill", turn, cpu_s=turn) for turn in (1, 2, 4))]
    theirs = [
        head_run("trl-dense", 0, cpu_s=1.0, timed=False),
        *(head_run("trl-dense", turn, cpu_s=5 * turn, mib=500) for turn in (1, 2, 4)),
    ]
    row = next(line for line in head.table([*ours, *theirs]).splitlines() if "| trl-dense |" in line)
    assert "5.00 (5.00 to 5.00)" in row and row.endswith("| 3 |")
    time_line, memory_line = head.goals([*ours, *theirs]).splitlines()
    assert time_line.endswith("at least 4; met") and memory_line.endswith("at least 8; missed")


def test_share_of_the_matrix_rate_counts_the_products_no_head_can_avoid():
    operations = 2 * 256 * 100 * (2 * 8 + 16)
    runs = [head_run("raystill", 1, cpu_s=2.0), head_run("bare", 1, cpu_s=1.0, matrix_flops=float(operations))]
    assert head.share(runs, runs[:1]) == "50%"
    assert head.share(runs[:1], runs[:1]) == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_cell_has_settings_and_contestants_on_each_device(device):
    shape = dict.fromkeys(("dtype", "positions", "vocabulary", "student_width", "teacher_width"))
    for cell in head.CELLS:
        settings = head.settings_of(cell, Namespace(device=device, threads=1, **shape))
        names = head.systems_of(settings)
        assert ("torchtune" in names) == (cell != "jsd") and ("liger-triton" in names) == (device == "cuda")
        assert settings["positions"] == 8192 or device == "cpu"
        assert settings["dtype"] in head.TOLERANCE


def test_steps_with_another_first_loss_are_refused():
    same = [step_run("raystill-epoch1", 1, cpu_s=[1.0]), step_run("trl", 1, cpu_s=[1.0]), step_run("bare-epoch1", 1, cpu_s=[1.0])]
    step.refuse_other_work(same)
    with pytest.raises(SystemExit, match="first of losses of full-all"):
        step.refuse_other_work([*same, step_run("trl-checkpointing", 1, cpu_s=[1.0], loss=2.001)])


def test_step_speeds_are_beside_trl_in_the_same_turn_with_the_aim_beside_them():
    runs = [step_run("raystill-epoch2", 1, cpu_s=[1.0, 3.0, 2.0], mib=59), step_run("trl", 1, cpu_s=[4.0, 2.0, 2.5])]
    runs += [step_run("raystill-epoch2", 2, cpu_s=[9.0], mib=59), step_run("raystill-epoch1", 1, cpu_s=[2.0])]
    rows = step.table(runs).splitlines()
    assert "| 1.25 (1.25 to 1.25) |" in rows[2] and "| 0.59 (0.59 to 0.59) |" in rows[2]
    assert "2.50 (2.00 to 4.00) | 205 | 1.00 (1.00 to 1.00)" in rows[3]
    found = step.goals(runs).splitlines()
    assert [line.rpartition("; ")[2] for line in found] == ["met", "missed", "met"]
