"""What a distillation does in Ray tasks of its own, each within the limits of a worker."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ray_jobs.core.storage import Storage
from ray_jobs.distillation.influence import measure_influence
from ray_jobs.distillation.making import Student
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.memory import hold_gpu, memory_limit


def measure_layers(load: Callable[[str], Any], rows: Storage, seed: int, micro_batch_size: int, workers: Any) -> dict[str, Any]:
    """Return the block influence of the teacher's layers on training rows.

    Args:
        load: device -> the teacher.
        rows: folder with `train`.
        workers: has the fields of [workers], here and below.
    """
    with _within(workers):
        return measure_influence(load(workers.device), PackedRows(rows.local("train")), seed=seed, micro_batch_size=micro_batch_size)


def merge_student(student: Student, stage: Storage, workers: Any) -> None:
    """Write the student as it was trained on, with its adapter added."""
    with _within(workers):
        student.write_merged(stage, device=workers.device)


@contextlib.contextmanager
def _within(workers: Any) -> Iterator[None]:
    torch.set_num_threads(max(1, int(workers.cpus)))
    hold_gpu(workers.device, workers.gpu_memory_bytes)
    with memory_limit(workers.memory_bytes, gpu_limit_bytes=workers.gpu_memory_bytes):
        yield
