"""A worker's share of a GPU: what it may take, what it took, and the one line when it wants more."""

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

# in a process of its own: the share and the peak stay with a process for as long as it lives
PAST_ITS_SHARE = """
import torch
from ray_jobs.core.errors import MemoryLimitExceeded
from ray_jobs.core.memory import peaks
from ray_jobs.training.memory import hold_gpu, memory_limit
hold_gpu("cuda:0", 2**30)
with memory_limit(2**40, gpu_limit_bytes=2**30):
    kept = torch.ones(2**27, device="cuda:0")  # 0.5 GiB
assert 2**29 <= peaks()["gpu_peak_bytes"] < 2**30
try:
    with memory_limit(2**40, rank=3, gpu_limit_bytes=2**30):
        torch.ones(2**28, device="cuda:0")
except MemoryLimitExceeded as error:
    print(error)
assert kept.sum() == 2**27
assert torch.cuda.mem_get_info()[0] > 0
"""


def test_a_worker_is_held_to_its_share_of_the_gpu():
    ended = subprocess.run([sys.executable, "-c", PAST_ITS_SHARE], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("worker 3 needs more memory than the 1.00 GiB (1.07 GB) it may use of its GPU (peak 0.5")
    assert ended.stdout.count("\n") == 1
