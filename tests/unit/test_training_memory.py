"""The memory limit of one process."""

import pickle
import resource

import pytest
import torch

from ray_jobs.core.errors import MemoryLimitExceeded, TrainingFailed
from ray_jobs.core.memory import peak_bytes, reset_peak
from ray_jobs.training.memory import memory_limit


def test_an_allocation_past_the_limit_ends_in_one_line_and_leaves_the_process_unharmed():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryLimitExceeded, match=r"worker 3 needs more than its .* GiB.*raise \[workers\] memory") as caught:
        with memory_limit(peak_bytes() + 100 * 2**20, rank=3):
            torch.ones(2**29)  # 2 GiB
    assert "\n" not in str(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.ones(2**20).sum() == 2**20
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), MemoryLimitExceeded)


def test_work_within_the_limit_passes():
    with memory_limit(peak_bytes() + 2**30):
        assert torch.ones(2**20).sum() == 2**20


def test_other_errors_pass_through():
    with pytest.raises(TrainingFailed, match="lower learning_rate"):
        with memory_limit(peak_bytes() + 2**30):
            raise TrainingFailed("lower learning_rate")
    with pytest.raises(RuntimeError, match="shapes"):
        with memory_limit(peak_bytes() + 2**30):
            raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore on this."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_gpu_is_not_told_as_host_memory(error):
    with pytest.raises(MemoryLimitExceeded, match=r"than its GPU has .*micro_batch_size.*qlora") as caught:
        with memory_limit(peak_bytes() + 2**30):
            raise error
    assert "[workers] memory" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_peak_falls_where_it_is_reset():
    block = bytearray(b"x") * (64 * 2**20)
    before = peak_bytes()
    del block
    if not reset_peak():
        pytest.skip("this kernel does not reset it")
    assert peak_bytes() < before - 32 * 2**20
