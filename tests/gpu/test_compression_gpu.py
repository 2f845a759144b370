"""The plain models' rows on a GPU come from the code path of the CPU's."""

import pytest
import torch

from ray_jobs.compression.parity import relative_error
from ray_jobs.compression.runtimes import TorchRuntime
from ray_jobs.training.models import choose_dtype, load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
IDS = [11, 205, 3307, 41, 17000, 8, 999, 23]


def test_the_gpu_says_what_the_cpu_says(tiny_model):
    on_cpu = TorchRuntime(load_model(tiny_model, dtype=torch.float32))
    on_gpu = TorchRuntime(load_model(tiny_model, dtype=choose_dtype("auto", "cuda"), device="cuda"))
    assert relative_error(on_gpu.logits(IDS), on_cpu.logits(IDS)) < 0.05
    generation = on_gpu.generate(IDS, 8)
    assert len(generation.token_ids) == 8
    assert 0 < generation.first_token_s < generation.total_s
