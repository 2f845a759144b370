"""The memory plan against real training, in processes of their own; benchmarks/MEMORY.md has all rows."""

import pytest

from benchmarks.memory import Row, predicted, run_apart


@pytest.mark.parametrize(
    "row", [Row("lora", 256, 1), Row("full", 128, 1), Row("full", 128, 1, targets="worker")], ids=lambda row: row.method + row.targets
)
def test_predicted_peak_is_within_15_percent_of_the_measured(row, smollm2):
    assert predicted(row) == pytest.approx(run_apart(row)["peak"], rel=0.15)
