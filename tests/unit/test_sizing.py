"""The lines about a node that has the memory but does not offer it."""

from ray_jobs.core.sizing import memory_hints

GIB = 2**30


def node(memory, store=0.0, cpus=8):
    return {"CPU": cpus, "memory": memory, "object_store_memory": store}


def test_what_ray_keeps_for_its_object_store_is_named_with_the_command():
    hint = memory_hints({"CPU": 2, "memory": 16 * GIB}, [node(12 * GIB, 5 * GIB), node(2 * GIB)])
    assert "17.00 GiB (18.25 GB), of which Ray keeps 5.00 GiB (5.37 GB) for its object store" in hint
    assert f"ray start --object-store-memory={GIB} --memory={16 * GIB}" in hint


def test_a_node_without_the_memory_gets_no_such_advice():
    assert memory_hints({"CPU": 2, "memory": 16 * GIB}, [node(10 * GIB, 5 * GIB)]) == ""


def test_the_difference_of_the_units_is_named_where_it_decides():
    hint = memory_hints({"CPU": 2, "memory": 16 * GIB}, [node(16.5e9)])
    assert hint == "; GiB are larger than GB: 16GiB is 17.18 GB, and 16GB would fit"


def test_where_memory_is_not_what_is_missing_nothing_is_said():
    assert memory_hints({"CPU": 64, "memory": 16 * GIB}, [node(12 * GIB, 5 * GIB)]) == ""
    assert memory_hints({"CPU": 2, "memory": 4 * GIB}, [node(12 * GIB, 5 * GIB)]) == ""
    assert memory_hints({"CPU": 2}, []) == ""
