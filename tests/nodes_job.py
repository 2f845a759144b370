"""A student on one node that asks a pool on others, as a driver of its own: `python nodes_job.py ROWS MODEL OUT`.

OUT/nodes gets a file for each node that held a teacher, with the id of its process; OUT/student that of the student's node.
"""

import sys

import torch

from ray_jobs.core.cluster import connect
from ray_jobs.distillation.pool import PoolTargets, teacher_pool
from ray_jobs.distillation.pool_actors import PoolOptions

POOL = PoolOptions(memory_bytes=2**30)
"""Only a node of teachers has so much."""


def teacher(model, out):
    """Return what loads the teacher and writes down where: a nested function, as workers cannot import the tests."""

    def load(device):
        import os
        from pathlib import Path

        import ray

        from ray_jobs.training.models import load_model

        Path(out, "nodes").mkdir(exist_ok=True)
        Path(out, "nodes", ray.get_runtime_context().get_node_id()).write_text(str(os.getpid()))
        return load_model(model, dtype=torch.float32, device=device)

    return load


def student(rows, model, out, pool):
    """Ask for three micro-batches; between the first and the second wait until somebody creates OUT/go."""
    import time
    from pathlib import Path

    import ray

    from ray_jobs.training.batches import PackedRows, collate
    from ray_jobs.training.models import load_model

    torch.set_num_threads(1)
    packed = PackedRows(rows)
    batches = [collate([packed[index], packed[index + 1]]) for index in range(0, 6, 2)]
    targets = PoolTargets(pool, lambda: load_model(model, dtype=torch.float32).get_output_embeddings().weight, ahead=1)
    found = [targets.of(batches[0]).hidden_NH]
    Path(out, "student").write_text(ray.get_runtime_context().get_node_id())
    while not Path(out, "go").exists():
        time.sleep(0.05)
    targets.announce(batches[1:])
    found += [targets.of(batch).hidden_NH for batch in batches[1:]]
    torch.save({"hidden": found, "facts": targets.facts(), "waited_s": targets.waited_s}, Path(out, "found.tmp"))
    Path(out, "found.tmp").rename(Path(out, "found"))


def run(rows, model, out):
    """Run both on the cluster of RAY_ADDRESS."""
    import ray

    with connect(), teacher_pool(teacher(model, out), dtype="float32", options=POOL) as pool:
        ray.get(ray.remote(student).options(num_cpus=1, resources={"student": 1}).remote(rows, model, out, pool))


if __name__ == "__main__":
    run(*sys.argv[1:])
