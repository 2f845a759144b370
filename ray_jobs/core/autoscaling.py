"""What fits the nodes a cluster has, and those its autoscaler can start: plain functions over resources."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Resources = Mapping[str, float]
BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves cluster.yaml on the head, on which the drivers of submitted jobs run. Ray keeps it nowhere else."""


class NodeType(NamedTuple):
    """One of `available_node_types`: what a node of it has, and how many there may be."""

    resources: Resources
    max_nodes: int


class NodeTypes(NamedTuple):
    """What an autoscaler can start: the types but the head's, and how many nodes of all of them."""

    kinds: dict[str, NodeType]
    max_workers: int


def times_fitting(bundle: Resources, node: Resources) -> int:
    """Return how many such bundles an idle node holds."""
    wanted = {key: amount for key, amount in bundle.items() if amount}
    return min((int(node.get(key, 0) / amount + 1e-9) for key, amount in wanted.items()), default=10**6)


def groups_fitting(group: Sequence[Resources], nodes: Sequence[Resources], *, at_most: int) -> int:
    """Return how many such groups of bundles the nodes hold together when idle; a bundle is on one node."""
    left = [dict(node) for node in nodes]
    for number in range(at_most):
        if not all(_take(bundle, left) for bundle in group):
            return number
    return at_most


def _take(bundle: Resources, left: list[dict[str, float]]) -> bool:
    for node in left:
        if times_fitting(bundle, node):
            node.update({key: node.get(key, 0) - amount for key, amount in bundle.items()})
            return True
    return False


def most_fitting(bundle: Resources, types: NodeTypes) -> int:
    """Return how many such bundles fit when the autoscaler has started all it may."""
    free, total = types.max_workers, 0
    for kind in sorted(types.kinds.values(), key=lambda kind: times_fitting(bundle, kind.resources), reverse=True):
        num_nodes = min(kind.max_nodes, free)
        free -= num_nodes
        total += num_nodes * times_fitting(bundle, kind.resources)
    return total


def parse_node_types(config: dict[str, Any]) -> NodeTypes:
    """Return the types of a cluster.yaml."""
    most = config.get("max_workers", 2)
    types = {name: kind for name, kind in config.get("available_node_types", {}).items() if name != config.get("head_node_type")}
    return NodeTypes({name: NodeType(kind.get("resources", {}), kind.get("max_workers", most)) for name, kind in types.items()}, most)


def node_types(path: Path = BOOTSTRAP_CONFIG) -> NodeTypes:
    """Return what this machine's cluster can start; nothing where this is no head that `ray up` made."""
    import yaml

    file = path.expanduser()
    return parse_node_types(yaml.safe_load(file.read_text())) if file.is_file() else NodeTypes({}, 0)
