"""What runs on each Ray Train worker: the training loop within its limits, checkpoints for Ray, one clear end."""

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ray_jobs.core.errors import JobError
from ray_jobs.core.progress import OnProgress
from ray_jobs.core.storage import Storage, local_folder
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.trackers import open_trackers

CHECKPOINTS = "checkpoints"
RESULT = "result.json"
FAILURE = "failure.json"
METRICS = "metrics.jsonl"
METRICS_EVERY_S = 2.0
BREACHED = 12
"""Exit code of a worker that its memory watch ended."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many workers, and what each may use."""

    min_workers: int = 1
    max_workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 16 * 2**30
    gpu_memory_bytes: int = 16 * 2**30
    strategy: str = "ddp"
    zero_stage: int = 2
    offload: str = "none"

    @classmethod
    def of(cls, section: Any) -> "Workers":
        """Return what the config's [workers] says."""
        return cls(**{field.name: getattr(section, field.name) for field in fields(cls)})

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray schedules for one worker."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}
        return {name: amount for name, amount in wanted.items() if amount}


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What each worker does; pickled to it.

    `build(device)` returns (model, loss) with the model on the device, equal on all workers; `export(model, folder)`
    writes the trained model. Both are module-level functions or partials of them.
    """

    build: Callable[[str], tuple[Any, Any]]
    export: Callable[[Any, Path], None]
    export_name: str
    """Folder below `storage` that gets what `export` wrote."""
    storage: Storage
    """The stage's folder."""
    rows: Storage
    """Folder with `train` and `eval` packed rows."""
    open_rows: Callable[[Path], Any] | None = None
    """From a folder of packed rows to PackedRows of another kind; none takes them as they are."""
    evaluate: bool
    """Whether there are held-out rows."""
    recipe: Recipe
    plan: JobPlan | None = None
    """What each worker was predicted to hold, for the message of a worker that passes its limit."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Who gets the lines of metrics.jsonl beside the file."""
    title: str = ""
    """What the run is called there."""


def work(config: dict[str, Any]) -> None:
    """Train on this worker. What raystill raises on purpose would come again, so it ends the job instead of a restart."""
    from ray_jobs.training.full_disk import name_full_disk
    from ray_jobs.training.memory import memory_limit
    from ray_jobs.training.ranks import rank

    job: TrainingJob = config["job"]
    if job.storage.exists(FAILURE):
        return
    workers: Workers = config["workers"]

    def on_breach(error: JobError) -> None:
        _write_failure(job.storage, error)
        os._exit(BREACHED)  # the thread that trains may be inside a call that no exception reaches

    limits = {"gpu_limit_bytes": workers.gpu_memory_bytes, "plan": job.plan, "on_breach": on_breach}
    try:
        with memory_limit(workers.memory_bytes, rank=rank(), **limits), name_full_disk(job.storage):
            _train(job, workers, config["keep_checkpoints"], config["on_progress"])
    except JobError as error:
        _write_failure(job.storage, error)
        raise


def _write_failure(storage: Storage, error: JobError) -> None:
    with contextlib.suppress(OSError):  # on a full disk; then the error alone reaches the driver, after its restarts
        storage.write_json(FAILURE, {"error": type(error).__name__, "message": str(error)})


def _train(job: TrainingJob, workers: Workers, keep_checkpoints: int, on_progress: OnProgress) -> None:
    import torch
    from ray.train.torch import get_device

    from ray_jobs.core.memory import peaks
    from ray_jobs.training.allocator import return_freed_memory
    from ray_jobs.training.batches import PackedRows
    from ray_jobs.training.full_disk import require_room
    from ray_jobs.training.loop import train
    from ray_jobs.training.loss_hooks import LossHooks
    from ray_jobs.training.memory import hold_gpu
    from ray_jobs.training.ranks import gather, rank
    from ray_jobs.training.strategies import choose_strategy

    torch.set_num_threads(max(1, int(workers.cpus)))
    torch.manual_seed(job.recipe.seed)
    device = str(get_device())
    hold_gpu(device, workers.gpu_memory_bytes)
    if job.plan is not None and job.plan.is_tight:
        return_freed_memory()
    open_rows = job.open_rows or PackedRows
    model, loss = job.build(device)
    counts = _counts(model)  # before a strategy cuts it into pieces
    with _last_checkpoint(job.storage.sub(CHECKPOINTS)) as folder, _open_log(job) as on_log:
        if rank() == 0:  # a new checkpoint is written before an old one is deleted
            require_room(job.storage, model, num_checkpoints=1 if folder else keep_checkpoints + 1)
        progress = train(
            model,
            loss,
            open_rows(job.rows.local("train")),
            eval_rows=open_rows(job.rows.local("eval")) if job.evaluate else None,
            recipe=job.recipe,
            strategy=choose_strategy(workers.strategy, zero_stage=workers.zero_stage, offload=workers.offload),
            resume_from=folder,
            on_progress=on_progress,
            on_log=on_log,
            on_checkpoint=functools.partial(_report, job.storage),
        )
        on_log(progress.log)  # all lines may be of an earlier attempt
        facts = LossHooks(loss).facts()
    peak = gather(peaks())
    if rank() == 0:
        job.storage.write_jsonl(METRICS, progress.log)
        with tempfile.TemporaryDirectory() as temporary:
            job.export(model, Path(temporary))
            job.storage.upload(Path(temporary), job.export_name)
        job.storage.write_json(RESULT, {**_result(progress, peak), **counts, "memory": _memory(job, workers), "loss_facts": facts})


def _result(progress: Any, peak: list[dict[str, int]]) -> dict[str, Any]:
    from ray_jobs.training.metrics import counted

    return {
        "eval_before": progress.eval_before,
        "eval_after": progress.eval_after,
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 3),
        "loss_counts": counted(progress.log),
        "peak_bytes": [each["host_peak_bytes"] for each in peak],
        "gpu_peak_bytes": [each["gpu_peak_bytes"] for each in peak],
    }


def _memory(job: TrainingJob, workers: Workers) -> dict[str, dict[str, int | None]]:
    """Return what a worker might use and was predicted to, on the host and, where it has one, on its GPU."""
    plan = job.plan
    on_gpu, predicted = workers.gpus > 0, plan.total if plan else None
    host = {"limit_bytes": workers.memory_bytes, "predicted_bytes": plan.host_total if plan and on_gpu else predicted}
    gpu = {"gpu": {"limit_bytes": workers.gpu_memory_bytes, "predicted_bytes": predicted}} if on_gpu else {}
    return {"host": host, **gpu}


def _counts(model: Any) -> dict[str, int]:
    return {"trainable_parameters": model.num_parameters(only_trainable=True), "total_parameters": model.num_parameters()}


@contextlib.contextmanager
def _last_checkpoint(checkpoints: Storage) -> Iterator[Path | None]:
    import ray.train

    from ray_jobs.training.sealed import newest_sealed

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            yield Path(folder)
        return
    sealed = newest_sealed(checkpoints)  # there is one where Ray's register was torn
    yield None if sealed is None else local_folder(sealed.uri)


def _report(storage: Storage, step: int, save: Callable[[Path | None], None]) -> None:
    """Give Ray Train a checkpoint, which all workers gather and one writes; it counts once every worker has reported."""
    import ray.train

    from ray_jobs.training.sealed import seal

    if ray.train.get_context().get_world_rank() != 0:
        save(None)
        ray.train.report({"step": step})
        return
    name = f"step-{step:06d}"
    with tempfile.TemporaryDirectory() as temporary:
        save(Path(temporary))
        seal(Path(temporary))
        try:
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(temporary), checkpoint_dir_name=name)
        except OSError:
            storage.delete(f"{CHECKPOINTS}/{name}")  # the half of it takes room, on a disk that may have none
            raise


@contextlib.contextmanager
def _open_log(job: TrainingJob) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield what writes the lines to metrics.jsonl and the trackers; on all workers but the first it does nothing."""
    from ray_jobs.training.ranks import rank

    if rank() != 0:
        yield lambda lines: None
        return
    file = _MetricsFile(job.storage)
    with open_trackers(job.trackers, storage=job.storage, title=job.title, settings=dataclasses.asdict(job.recipe)) as trackers:

        def log(lines: list[dict[str, Any]]) -> None:
            file(lines)
            trackers(lines)

        yield log


class _MetricsFile:
    """Writes metrics.jsonl whole, a few times a minute at most, so that it can be watched."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._written = 0.0

    def __call__(self, lines: list[dict[str, Any]]) -> None:
        if time.monotonic() - self._written >= METRICS_EVERY_S:
            self._storage.write_jsonl(METRICS, lines)
            self._written = time.monotonic()
