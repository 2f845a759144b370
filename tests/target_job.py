"""A tiny distillation with a pool and a cache that needs no stage before it; a driver: `python target_job.py STAGE ROWS MODEL CACHE`."""

import sys

import torch

from ray_jobs.core.cluster import connect, require_together
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.pool import teacher_pool
from ray_jobs.distillation.pool_actors import PoolOptions
from ray_jobs.training.ray_train import TrainingJob, Workers, fit
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13), (10,), (6, 10), (15,), (4, 4)] * 4
RECIPE = Recipe(max_steps=60, learning_rate=1e-3, global_batch_size=2, micro_batch_size=2, dtype="float32", checkpoint_every_steps=3)
OPTIONS = PoolOptions(memory_bytes=2 * 2**30)
WORKERS = Workers(memory_bytes=2 * 2**30)


def distillation(model, cache, pool=None):
    """Return what builds a student of two layers with its loss: a nested function, as workers cannot import the tests."""

    def load(device):
        import torch

        from ray_jobs.training.models import load_model

        return load_model(model, dtype=torch.float32, device=device)

    num_rows = len(SEGMENTS)

    def build(device):
        from ray_jobs.distillation.divergence import Divergence
        from ray_jobs.distillation.loss import DistillLoss
        from ray_jobs.distillation.sources import Cache, Teacher, make_targets
        from ray_jobs.distillation.student import build_student

        kept = Cache(cache, "hidden", "float32", 64, 2**30) if cache else None
        teacher = Teacher(model, None, "none", "float32", load)
        targets = make_targets(teacher, device=device, pool=pool, ahead=2, cache=kept, num_rows=num_rows, num_tokens=None)
        return build_student(load(device), [0, 3]), DistillLoss(
            targets, divergence=Divergence(temperature=2.0), kd_weight=0.9, ce_weight=0.1
        )

    return load, build


def run(stage, rows, model, cache):
    """Distil with a pool and a cache on the cluster of RAY_ADDRESS, or go on with it."""
    load, _ = distillation(model, cache)

    def export(student, folder):
        student.save_pretrained(folder)

    with connect():
        require_together([("workers", WORKERS.bundle, 1), ("pool", OPTIONS.bundle, 1)])
        with teacher_pool(load, dtype="float32", options=OPTIONS) as pool:
            storages = {"storage": Storage(stage), "rows": Storage(rows)}
            build = distillation(model, cache, pool)[1]
            job = TrainingJob(build=build, export=export, export_name="student", evaluate=False, recipe=RECIPE, **storages)
            return fit(job, workers=WORKERS, max_failures=3, keep_checkpoints=2, label="tiny")


def alone(rows, model):
    """Return the weights of the same student from a teacher beside it: no Ray, no pool, no cache, nothing killed."""
    from pathlib import Path

    from ray_jobs.training.batches import PackedRows
    from ray_jobs.training.loop import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student, loss = distillation(model, None)[1]("cpu")
    train(student, loss, PackedRows(Path(rows) / "train"), eval_rows=None, recipe=RECIPE)
    torch.set_num_threads(threads)
    return student.state_dict()


if __name__ == "__main__":
    run(*sys.argv[1:])
