"""What an idle cluster and its autoscaler can hold: by hand-made nodes, and by the cluster.yaml that ships."""

from pathlib import Path

import pytest
import yaml

from ray_jobs.core.autoscaling import NodeType, NodeTypes, groups_fitting, most_fitting, node_types, parse_node_types
from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ClusterError
from ray_jobs.tune import num_concurrent

GIB = 2**30
CLUSTER = Path(__file__).parents[2] / "cluster.yaml"
WORKER = {"CPU": 4, "GPU": 1, "memory": 16 * GIB}


def test_the_shipped_cluster_with_its_head_alone_can_start_four_workers_of_16_gb():
    types = parse_node_types(yaml.safe_load(CLUSTER.read_text()))
    assert list(types.kinds) == ["gpu16"]
    bundle = validate({"run": {"name": "a"}, "workers": {"gpus": 1, "memory": "16GiB"}}).workers.bundle
    assert most_fitting(bundle, types) == 4
    assert most_fitting({**bundle, "memory": 64 * GIB}, types) == 0


def test_nodes_of_all_types_together_are_bounded():
    small, big = NodeType({"CPU": 2}, 5), NodeType({"CPU": 8}, 2)
    assert most_fitting({"CPU": 2, "GPU": 0}, NodeTypes({"small": small, "big": big}, 3)) == 2 * 4 + 1
    assert most_fitting({"CPU": 2}, NodeTypes({}, 0)) == 0


def test_node_types_are_read_from_where_ray_up_leaves_them(tmp_path):
    assert node_types(tmp_path / "none.yaml") == NodeTypes({}, 0)
    assert node_types(CLUSTER).kinds["gpu16"].max_nodes == 4


def test_a_trial_counts_with_its_own_process():
    nodes = [{"CPU": 8, "GPU": 2, "memory": 32 * GIB}]
    assert groups_fitting([WORKER], nodes, at_most=9) == 2
    assert num_concurrent(9, WORKER, 1, nodes) == 1
    assert num_concurrent(9, WORKER, 1, [*nodes, *nodes]) == 3
    assert num_concurrent(1, WORKER, 1, [*nodes, *nodes]) == 1
    with pytest.raises(ClusterError, match=r"no room for a trial's own process \(0\.25 GiB memory\)"):
        num_concurrent(9, WORKER, 2, nodes)
    assert nodes == [{"CPU": 8, "GPU": 2, "memory": 32 * GIB}]
