"""Why a node that has the memory does not offer it: Ray's object store, and GB against GiB. Plain functions over resources."""

from ray_jobs.core.autoscaling import Resources, times_fitting
from ray_jobs.core.sizes import both_units

LEAST_STORE_BYTES = 100 * 10**6
"""A node needs some; Ray takes no less than 75 MiB."""


def memory_hints(bundle: Resources, nodes: list[Resources]) -> str:
    """Return what to know when only memory keeps a bundle from every node; "" where that is not so.

    Args:
        bundle: what one worker asks, `memory` in bytes.
        nodes: what each node offers; Ray states its `object_store_memory` beside `memory`.

    Source: ray/_private/resource_and_label_spec.py: a node offers what was free at its start, less its object store (30%).
    """
    wanted = bundle.get("memory", 0)
    rest = {key: amount for key, amount in bundle.items() if key != "memory"}
    able = [node for node in nodes if times_fitting(rest, node)]
    if not able or any(node.get("memory", 0) >= wanted for node in able):
        return ""
    best = max(able, key=lambda node: node.get("memory", 0) + node.get("object_store_memory", 0))
    return _store_hint(wanted, best) + _unit_hint(wanted, best)


def _store_hint(wanted: float, node: Resources) -> str:
    memory, store = node.get("memory", 0), node.get("object_store_memory", 0)
    left = memory + store - wanted
    if left < LEAST_STORE_BYTES:
        return ""
    return (
        f"; a node here has {both_units(memory + store)}, of which Ray keeps {both_units(store)} for its object store: "
        f"`ray start --object-store-memory={int(left)} --memory={int(wanted)}` on it would offer what is asked"
    )


def _unit_hint(wanted: float, node: Resources) -> str:
    in_gb = wanted / 2**30 * 10**9
    if in_gb > node.get("memory", 0):
        return ""
    return f"; GiB are larger than GB: {wanted / 2**30:g}GiB is {wanted / 10**9:.2f} GB, and {wanted / 2**30:g}GB would fit"
