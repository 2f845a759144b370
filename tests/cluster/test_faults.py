"""Training on real clusters while something breaks: a node is lost, a neighbour wants too much memory, the disk is full."""

import dataclasses
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_job
from tiny_job import losses, make_rows, undisturbed

from ray_jobs.core.errors import MemoryLimitExceeded, StorageError
from ray_jobs.core.storage import Storage
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.ray_train import Workers, fit

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
WORKERS = Workers(memory_bytes=3 * 2**29)


def train(job, *, workers=WORKERS):
    return fit(job, workers=workers, max_failures=1, keep_checkpoints=2, label="tiny")


@pytest.fixture
def rows(tmp_path):
    return make_rows(tmp_path / "rows")


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of its own, of two nodes with a CPU each, that notices a lost node at once; and its second node."""
    from ray.cluster_utils import Cluster

    for name, value in {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    yield cluster, second
    cluster.shutdown()


def wait_for_checkpoint(stage, *, after_step, timeout_s=150):
    """Return the step of the first checkpoint from `after_step` on."""
    ended = time.monotonic() + timeout_s
    while time.monotonic() < ended:
        steps = [int(name.removeprefix("step-")) for name in Storage(str(stage)).sub("checkpoints").names() if name.startswith("step-")]
        if steps and max(steps) >= after_step:
            return max(steps)
        time.sleep(0.05)
    raise TimeoutError(f"no checkpoint from step {after_step} on within {timeout_s} s")


def test_a_lost_node_leaves_one_worker_of_two_and_the_very_same_losses(two_nodes, rows, tiny_model, tmp_path):
    cluster, second = two_nodes
    stage, step = tmp_path / "stage", random.randrange(6, 30)
    command = [sys.executable, tiny_job.__file__, str(stage), str(rows), str(tiny_model), "1", "2"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        try:
            lost_at = wait_for_checkpoint(stage, after_step=step)
            cluster.remove_node(second, allow_graceful=False)
            _, said = driver.communicate(timeout=240)
        finally:
            driver.kill()
    assert driver.returncode == 0, said
    assert losses(stage) == pytest.approx(undisturbed(rows, tiny_model), rel=1e-4), f"node lost after step {lost_at}"
    assert len(Storage(str(stage)).read_json("result.json")["peak_bytes"]) == 1


def test_a_worker_past_its_limit_leaves_its_neighbour_unharmed(ray_cluster, rows, tiny_model, tmp_path):
    def hog():
        import mmap
        import time

        shared = mmap.mmap(-1, 3 * 2**29)  # what RLIMIT_DATA does not count
        while shared.tell() < len(shared):
            shared.write(b"x" * 2**20)
        time.sleep(60)

    plan = JobPlan({"weights": 2**29, "activations": 2**28, "adapter": 2**20}, 3 * 2**28, 3 * 2**29, "micro_batch_size = 1 in place of 2")
    neighbour = threading.Thread(target=train, args=(tiny_job.tiny_job(tmp_path / "neighbour", rows, tiny_model),))
    neighbour.start()
    job = tiny_job.tiny_job(tmp_path / "hog", rows, tiny_model, at_step=3, disturb=hog)
    with pytest.raises(MemoryLimitExceeded) as caught:
        train(dataclasses.replace(job, plan=plan))
    neighbour.join()
    for words in (
        "worker 0 with its child processes and shared memory needs more than its 1.50 GiB (1.61 GB)",
        "weights 0.50 GiB, activations 0.25 GiB",
        "micro_batch_size = 1 in place of 2",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert losses(tmp_path / "neighbour") == pytest.approx(undisturbed(rows, tiny_model), rel=1e-6)


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small filesystem can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(ray_cluster, rows, tiny_model, small_disk):
    ballast = str(small_disk / "ballast")

    def fill():
        import contextlib

        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while file.write(b"x" * 2**16):
                pass

    step, stage = random.randrange(7, 40), small_disk / "stage"
    with pytest.raises(StorageError, match=r"(no more can be written|checkpoints need) .*last whole checkpoint is kept") as caught:
        train(tiny_job.tiny_job(stage, rows, tiny_model, at_step=step, disturb=fill))
    assert "\n" not in str(caught.value)
    os.unlink(ballast)
    assert wait_for_checkpoint(stage, after_step=3) < step
    result = train(tiny_job.tiny_job(stage, rows, tiny_model))
    assert result["steps"] == 60
    assert losses(stage) == pytest.approx(undisturbed(rows, tiny_model), rel=1e-6), f"disk filled in step {step}"
