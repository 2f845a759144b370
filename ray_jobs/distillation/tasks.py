"""What a distillation does in Ray tasks of its own, each within the limits of a worker."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ray_jobs.core.cluster import require
from ray_jobs.core.progress import say
from ray_jobs.core.storage import Storage
from ray_jobs.core.tasks import start_task, task_results
from ray_jobs.distillation.influence import influence_table, measure_influence, most_influential
from ray_jobs.distillation.job import DistillJob
from ray_jobs.distillation.making import STUDENT, Student
from ray_jobs.distillation.start import Start
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.memory import hold_gpu, memory_limit

INFLUENCE = "influence.json"
"""The measured block influences, in the stage's folder: measured once, also by a job that is resumed."""


def find_start(job: DistillJob, stage: Storage, rows: Storage, workers: Any) -> Start:
    """Return where the student's first weights come from; its layers are measured here where they are chosen so.

    Args:
        rows: folder with `train`.
        workers: has the fields of [workers], here and below.

    Raises:
        ClusterError: no node can hold the measurement.
    """
    start, num_layers = job.first_start(), job.student["layers"]
    if job.student["choose"] == "even" or not isinstance(num_layers, int):
        return start
    measure = functools.partial(measure_layers, job.load_teacher, rows, job.seed, job.distill["micro_batch_size"], workers.device)
    return start._replace(layers=tuple(influential_layers(measure, num_layers, stage, workers)))


def influential_layers(measure: Callable[[], dict[str, Any]], num_layers: int, stage: Storage, workers: Any) -> list[int]:
    """Return the layers with the highest block influence, which is measured in a task of its own and kept in the stage's folder.

    Args:
        measure: returns what `measure_influence` does; picklable.
        num_layers: how many stay.

    Raises:
        ClusterError: no node can hold the measurement.
    """
    if not stage.exists(INFLUENCE):
        require("[workers] of the layers' influence", workers.bundle)
        say("distill: measuring the influence of the teacher's layers")
        stage.write_json(INFLUENCE, task_results([start_task(_limited, measure, workers, bundle=workers.bundle)], what="distill")[0])
    found = stage.read_json(INFLUENCE)
    layers = most_influential(found["influence"], num_layers)
    for line in influence_table(found, layers):
        say(f"distill: {line}")
    return layers


def measure_layers(load: Callable[[str], Any], rows: Storage, seed: int, micro_batch_size: int, device: str) -> dict[str, Any]:
    """Return the block influence of the teacher's layers on training rows.

    Args:
        load: device -> the teacher.
    """
    return measure_influence(load(device), PackedRows(rows.local("train")), seed=seed, micro_batch_size=micro_batch_size)


def merge_adapter(student: Student, stage: Storage, workers: Any) -> None:
    """Write the plain student from the adapter that training left in a stage's folder, where it is not there yet.

    Raises:
        ClusterError: no node can hold it.
    """
    if not stage.uploaded(STUDENT):
        say("distill: merging the adapter into the student")
        require("[workers] of the merge", workers.bundle)
        task_results([start_task(merge_student, student, stage, workers, bundle=workers.bundle)], what="distill")


def merge_student(student: Student, stage: Storage, workers: Any) -> None:
    """Write the student as it was trained on, with its adapter added."""
    with _within(workers):
        student.write_merged(stage, device=workers.device)


def _limited(work: Callable[[], Any], workers: Any) -> Any:
    with _within(workers):
        return work()


@contextlib.contextmanager
def _within(workers: Any) -> Iterator[None]:
    torch.set_num_threads(max(1, int(workers.cpus)))
    hold_gpu(workers.device, workers.gpu_memory_bytes)
    with memory_limit(workers.memory_bytes, gpu_limit_bytes=workers.gpu_memory_bytes):
        yield
