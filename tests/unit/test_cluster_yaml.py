"""cluster.yaml: accepted by Ray's own checks, asks for the token everywhere, and holds what a worker asks for."""

import copy
import importlib.metadata
from pathlib import Path

import pytest
import yaml

from ray_jobs.core.config_file import validate

PATH = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def cluster():
    return yaml.safe_load(PATH.read_text())


def accept(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(cluster):
    prepared = accept(cluster)
    assert prepared["available_node_types"]["gpu16"]["resources"]["GPU"] == 1


def test_ray_would_not_accept_a_typo(cluster):
    with pytest.raises(Exception, match="max_worker"):
        accept(cluster | {"max_worker": 3})


def test_a_worker_with_a_16_gb_gpu_and_16_gib_of_memory_fits_a_node_and_none_runs_on_the_head(cluster):
    workers = validate({"run": {"name": "a"}, "workers": {"gpus": 1, "memory": "16GiB"}}).workers
    offered = cluster["available_node_types"]["gpu16"]["resources"]
    assert all(offered[resource] >= amount for resource, amount in workers.bundle.items())
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_every_node_asks_for_the_token_and_the_dashboard_is_on_loopback(cluster):
    starts = [line for key in ("head", "worker") for line in cluster[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(target.endswith(".ray/auth_token") for target in cluster["file_mounts"])


def test_the_image_and_torch_are_the_versions_tested_here(cluster):
    assert f"ray:{importlib.metadata.version('ray')}-" in cluster["docker"]["image"]
    assert any(f"torch=={importlib.metadata.version('torch').partition('+')[0]}" in line for line in cluster["setup_commands"])
