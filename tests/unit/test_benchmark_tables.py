"""A benchmark compares only what did the same work, and its ratios are those of one turn."""

import pytest

from benchmarks.finetune import refuse_other_work, table


def run(system, turn, *, cpu_s, loss=3.5, peak_bytes=100):
    return {
        "system": system,
        "turn": turn,
        "method": "lora",
        "checkpointing": False,
        "cpu_s": cpu_s,
        "wall_s": 2 * cpu_s,
        "peak_bytes": peak_bytes,
        "losses": [loss, 3.0],
    }


def test_contestants_with_another_first_loss_are_refused():
    refuse_other_work([run("raystill", "1", cpu_s=1.0), run("trl", "1", cpu_s=1.0, loss=3.5001)])
    with pytest.raises(SystemExit, match="not comparable"):
        refuse_other_work([run("raystill", "1", cpu_s=1.0), run("trl", "1", cpu_s=1.0, loss=3.6)])


def test_ratios_are_taken_within_a_turn_and_their_median_counts():
    ours = [run("raystill", str(turn), cpu_s=cpu_s) for turn, cpu_s in enumerate((1.0, 2.0, 10.0))]
    theirs = [run("trl", str(turn), cpu_s=cpu_s, peak_bytes=120) for turn, cpu_s in enumerate((1.5, 2.4, 10.0))]
    row = next(line for line in table([*ours, *theirs]).splitlines() if "| trl |" in line)
    assert "1.20 (1.00 to 1.50)" in row and "1.20 (1.20 to 1.20)" in row and row.endswith("| 3 |")


def test_a_turn_that_one_of_them_did_not_finish_is_left_out():
    runs = [run("raystill", "1", cpu_s=1.0), run("trl", "1", cpu_s=2.0), run("trl", "2", cpu_s=9.0)]
    assert next(line for line in table(runs).splitlines() if "| trl |" in line).endswith("| 1 |")
