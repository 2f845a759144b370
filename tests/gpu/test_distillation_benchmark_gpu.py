"""On a GPU the head's contestants are timed by what the device has done, and their memory is the allocator's."""

import pytest
import torch

from benchmarks import distillation_head, distillation_head_systems

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
SMALL = {"device": "cuda", "dtype": "bfloat16", "vocabulary": 4096, "student_width": 256, "teacher_width": 512, "positions": 512}


@pytest.mark.parametrize("cell", distillation_head.CELLS)
def test_head_in_bfloat16_counts_its_own_memory_and_stays_below_the_matrix_rate(cell):
    inputs = distillation_head_systems.draw_inputs({**distillation_head.CELLS[cell], **SMALL})
    meter = distillation_head_systems.Meter(inputs.student_NH.device)
    runs = {name: distillation_head_systems.SYSTEMS[name](inputs, "cuda") for name in distillation_head.OURS}
    found = {name: distillation_head_systems.repetition(run, inputs, meter, calls=3) for name, run in runs.items()}
    assert found["raystill"]["loss"] > 0 and found["raystill"]["grad_norm"] > 0
    assert 0 < found["raystill"]["peak_bytes"] < 100 * 2**20
    assert distillation_head_systems.matrix_flops(inputs.student_NH) > 1e12
