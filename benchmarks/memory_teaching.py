"""Distillation in the memory benchmark: a student cut from the model, with its teacher in the worker or its targets in a cache."""

import functools
from pathlib import Path
from typing import Any

import torch

from ray_jobs.core.models import resolve_model
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.cache import CachedTargets, KeptHidden
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.head import read_head
from ray_jobs.distillation.layers import choose_layers
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.making import Student
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.start import Start
from ray_jobs.distillation.student import student_settings
from ray_jobs.distillation.targets import HiddenTarget, LazyTeacher, Targets, WorkerTeacher
from ray_jobs.distillation.teacher import load_teacher
from ray_jobs.training.architecture import find_architecture
from ray_jobs.training.batches import IGNORE, Batch, step_batches
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.skeletons import skeleton_of
from ray_jobs.training.teaching_plan import Teaching

NUM_LAYERS = 20
"""Of the student."""
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"}


def settings_of(model: str) -> dict[str, Any]:
    """Return the student's config.json."""
    return student_settings(skeleton_of(find_architecture(model).settings).config, NUM_LAYERS)


def teaching_of(model: str, targets: str) -> Teaching:
    """Return what the plan is told of the teacher.

    Args:
        targets: worker, or cache where all of them are read.
    """
    return Teaching(find_architecture(model).settings, place={"worker": "worker", "cache": "head"}[targets])


def build_student(model: str, *, method: str, dtype: str) -> Any:
    """Return the student as `raystill distill` builds it."""
    layers = choose_layers(skeleton_of(find_architecture(model).settings).config.num_hidden_layers, NUM_LAYERS)
    return Student(Start(model, layers=layers), model, method=method, dtype=dtype, lora=LORA).load("cpu")


def build_loss(model: str, targets: str, rows: Any, recipe: Recipe, folder: Path) -> DistillLoss:
    """Return the divergence from the teacher, with the teacher loaded or its targets on disk.

    Args:
        folder: the cache's.
    """
    dtype = getattr(torch, recipe.dtype)
    load = functools.partial(load_teacher, model, dtype=dtype)
    source = WorkerTeacher(load()) if targets == "worker" else _filled(model, load, rows, recipe, folder)
    return DistillLoss(source, divergence=Divergence())


class _Random(LazyTeacher):
    """Says anything at once: a cache is filled without the memory of a forward pass."""

    def of(self, batch: Batch) -> HiddenTarget:
        head_VH = self.head()
        return HiddenTarget(torch.randn(int((batch.labels_BT[:, 1:] != IGNORE).sum()), head_VH.shape[1]).to(head_VH.dtype), head_VH)


def _filled(model: str, load: Any, rows: Any, recipe: Recipe, folder: Path) -> CachedTargets:
    dtype = getattr(torch, recipe.dtype)
    head = functools.partial(read_head, resolve_model(model), None, dtype=dtype, device="cpu", load=load)

    def cache(inner: Targets) -> CachedTargets:
        store = ShardStore(Storage(str(folder)), kind=recipe.dtype, budget_bytes=2**40)
        return CachedTargets(inner, store, identity="teacher", kept=KeptHidden(inner.head().shape[1], dtype), epoch_rows=len(rows))

    writing = cache(_Random(load, head))
    sizes = {"global_batch_size": recipe.global_batch_size, "micro_batch_size": recipe.micro_batch_size}
    for step in range(recipe.max_steps or 1):
        for batch in step_batches(rows, step=step, seed=recipe.seed, **sizes):
            writing.of(batch)
    writing.flush()
    return cache(LazyTeacher(load, head))
