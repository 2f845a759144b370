"""What the limit of one process does not count: its children, and memory it shares."""

import mmap
import subprocess
import sys
import threading

import pytest

from ray_jobs.core.errors import MemoryLimitExceeded
from ray_jobs.core.memory import held_bytes, peaks
from ray_jobs.core.sizes import both_units
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.memory import memory_limit
from ray_jobs.training.memory_watch import MemoryWatch

SIZE = 128 * 2**20
CHILD = f"block = bytearray(b'x') * {SIZE}; print('ready', flush=True); input()"
PLAN = JobPlan(
    {"weights": 3 * 2**30, "logits": 2**30, "adapter": 2**29, "rest": 1}, 9 * 2**29 + 1, 2**33, "micro_batch_size = 2 in place of 4"
)


def test_memory_of_a_child_counts():
    before = held_bytes()
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert held_bytes() > before + SIZE
        child.communicate(b"\n")
    assert held_bytes() < before + SIZE
    assert peaks()["host_peak_bytes"] > before + SIZE
    assert peaks()["gpu_peak_bytes"] == 0


def test_shared_memory_counts():
    before = held_bytes()
    with mmap.mmap(-1, SIZE) as shared:
        shared.write(b"x" * SIZE)
        assert held_bytes() > before + SIZE * 0.9


def test_what_no_allocation_notices_is_told_once_in_one_line():
    told, breached = [], threading.Event()

    def on_breach(error):
        told.append(error)
        breached.set()

    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        with memory_limit(held_bytes() + SIZE // 2, rank=1, plan=PLAN, on_breach=on_breach):
            child.stdout.readline()
            assert breached.wait(30)
        child.communicate(b"\n")
    (error,) = told
    assert isinstance(error, MemoryLimitExceeded)
    for part in (
        "worker 1 with its child processes",
        "GiB (",
        "weights 3.00 GiB, logits 1.00 GiB, adapter 0.50 GiB",
        "micro_batch_size = 2",
    ):
        assert part in str(error)
    assert "rest" not in str(error)
    assert "\n" not in str(error)


def test_within_the_limit_nothing_is_told():
    told = []
    with MemoryWatch(held_bytes() + 2**30, on_breach=told.append, every_s=0.001) as watch:
        assert watch
    assert not told


def test_a_breach_names_the_plan_and_the_smallest_change():
    with pytest.raises(
        MemoryLimitExceeded, match=r"worker 0 needs more than its .*planned were 4\.50 GiB, most of it weights 3\.00 GiB"
    ) as caught:
        with memory_limit(2**40, plan=PLAN):
            raise MemoryError
    assert str(caught.value).endswith("raise [workers] memory, or micro_batch_size = 2 in place of 4")


def test_a_full_gpu_names_its_limit():
    with pytest.raises(
        MemoryLimitExceeded,
        match=r"than the 16\.00 GiB \(17\.18 GB\) it may use of its GPU .*raise \[workers\] gpu_memory .*micro_batch_size = 2",
    ):
        with memory_limit(2**40, gpu_limit_bytes=2**34, plan=PLAN):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("size", "words"), [(16 * 10**9, "14.90 GiB (16.00 GB)"), (2**34, "16.00 GiB (17.18 GB)"), (5 * 2**20, "5.00 MiB (5.24 MB)")]
)
def test_a_size_is_given_in_both_units(size, words):
    assert both_units(size) == words
