"""A pool whose teacher is on another node than the student, while that node is lost and another one joins."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nodes_job
import pytest
import torch
from packed_rows import write_rows

from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.batches import PackedRows, collate
from ray_jobs.training.models import load_model

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
TEACHERS = {"num_cpus": 1, "memory": 2 * 2**30, "object_store_memory": 100 * 2**20}


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of its own: a node for the student, too small for a teacher, and one for a teacher; a lost node is noticed at once."""
    from ray.cluster_utils import Cluster

    for name, value in {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    small = {"num_cpus": 1, "memory": nodes_job.POOL.memory_bytes // 2, "resources": {"student": 1}, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    yield cluster, cluster.add_node(**TEACHERS)
    cluster.shutdown()


def wait_for(path, driver, *, timeout_s=180):
    ended = time.monotonic() + timeout_s
    while not path.exists():
        assert driver.poll() is None and time.monotonic() < ended, f"no {path.name}"
        time.sleep(0.05)


def test_the_teacher_of_another_node_says_the_same_also_from_a_third_one_when_its_node_is_lost(two_nodes, tiny_model, tmp_path):
    cluster, second = two_nodes
    rows = write_rows(tmp_path / "rows", [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13)])
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, nodes_job.__file__, str(rows), str(tiny_model), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        try:
            wait_for(tmp_path / "student", driver)
            assert [file.name for file in (tmp_path / "nodes").iterdir()] == [second.node_id]
            cluster.remove_node(second, allow_graceful=False)
            third = cluster.add_node(**TEACHERS)
            (tmp_path / "go").touch()
            _, said = driver.communicate(timeout=180)
        finally:
            driver.kill()
    assert driver.returncode == 0, said
    assert {file.name for file in (tmp_path / "nodes").iterdir()} == {second.node_id, third.node_id}
    assert (tmp_path / "student").read_text() == cluster.head_node.node_id
    found = torch.load(tmp_path / "found")
    assert found["waited_s"] > 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    packed, here = PackedRows(rows), WorkerTeacher(load_model(tiny_model, dtype=torch.float32))
    expected = [here.of(collate([packed[index], packed[index + 1]])).hidden_NH for index in range(0, 6, 2)]
    torch.set_num_threads(threads)
    assert all(map(torch.equal, found["hidden"], expected))
