"""The thin Ray Train layer that finetune and distill share: workers, checkpoints, restarts, limits, progress."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ray_jobs.core import errors
from ray_jobs.core.cluster import progress_board, require
from ray_jobs.core.errors import JobError, TrainingFailed
from ray_jobs.core.progress import OnProgress
from ray_jobs.core.storage import Storage
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.recipe import Recipe

CHECKPOINTS = "checkpoints"
RESULT = "result.json"
FAILURE = "failure.json"
METRICS = "metrics.jsonl"
METRICS_EVERY_S = 2.0
START_ATTEMPTS = 5
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # a cluster started by others has no such setting (see core.cluster)


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
    evaluate: bool
    """Whether there are held-out rows."""
    recipe: Recipe
    plan: JobPlan | None = None
    """What each worker was predicted to hold, for the message of a worker that passes its limit."""


def fit(job: TrainingJob, *, workers: Workers, max_failures: int, keep_checkpoints: int, label: str) -> dict[str, Any]:
    """Train on Ray workers, going on from this stage's last checkpoint; needs a connected cluster.

    Returns:
        eval_before and eval_after ({loss, terms, label_tokens} or None), steps, tokens, train_seconds,
        peak_bytes (a list, one for each rank), trainable_parameters, total_parameters.

    Raises:
        ClusterError: no node can hold a worker.
        MemoryLimitExceeded: a worker passed its limit.
        TrainingFailed: workers were lost more than `max_failures` times, or the loss is not finite.
    """
    storage = job.storage
    if not storage.exists(RESULT):
        require(f"[workers] of {label}", workers.bundle, workers.min_workers)
        storage.delete(FAILURE)
        with progress_board(label, "step") as on_progress:
            _run(job, workers, max_failures, keep_checkpoints, on_progress)
    storage.delete(CHECKPOINTS)
    return storage.read_json(RESULT)


def _run(job: TrainingJob, workers: Workers, max_failures: int, keep_checkpoints: int, on_progress: OnProgress) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    storage = job.storage
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "workers": workers, "on_progress": on_progress},
        scaling_config=ScalingConfig(num_workers=workers.min_workers, use_gpu=workers.gpus > 0, resources_per_worker=workers.bundle),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=storage.root,
            storage_filesystem=None if storage.is_local else storage.fs,
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=START_ATTEMPTS),
            checkpoint_config=CheckpointConfig(num_to_keep=keep_checkpoints),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        _raise_known(storage)
        raise TrainingFailed(f"training failed after {max_failures} restarts: {_reason(error)}; the same command goes on") from error
    _raise_known(storage)


def _raise_known(storage: Storage) -> None:
    if storage.exists(FAILURE):
        failure = storage.read_json(FAILURE)
        storage.delete(FAILURE)
        raise getattr(errors, failure["error"])(failure["message"])


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    return "; ".join(f"worker {rank}: {str(failure).strip().splitlines()[-1]}" for rank, failure in failures.items())


def _work(config: dict[str, Any]) -> None:
    """Run on each worker. What raystill raises on purpose would come again, so it ends the job instead of a restart."""
    from ray_jobs.training.memory import memory_limit
    from ray_jobs.training.ranks import rank

    job: TrainingJob = config["job"]
    if job.storage.exists(FAILURE):
        return
    workers: Workers = config["workers"]
    try:
        with memory_limit(workers.memory_bytes, rank=rank()):
            _train(job, workers, config["on_progress"])
    except JobError as error:
        job.storage.write_json(FAILURE, {"error": type(error).__name__, "message": str(error)})
        raise


def _train(job: TrainingJob, workers: Workers, on_progress: OnProgress) -> None:
    import torch
    from ray.train.torch import get_device

    from ray_jobs.core.memory import peak_bytes
    from ray_jobs.training.batches import PackedRows
    from ray_jobs.training.loop import train
    from ray_jobs.training.ranks import gather, rank

    torch.set_num_threads(max(1, int(workers.cpus)))
    torch.manual_seed(job.recipe.seed)
    model, loss = job.build(str(get_device()))
    with _last_checkpoint() as folder:
        progress = train(
            model,
            loss,
            PackedRows(job.rows.local("train")),
            eval_rows=PackedRows(job.rows.local("eval")) if job.evaluate else None,
            recipe=job.recipe,
            resume_from=folder,
            on_progress=on_progress,
            on_log=_MetricsFile(job.storage),
            on_checkpoint=_report,
        )
    peaks = gather(peak_bytes())
    if rank() == 0:
        job.storage.write_jsonl(METRICS, progress.log)
        with tempfile.TemporaryDirectory() as temporary:
            job.export(model, Path(temporary))
            job.storage.upload(Path(temporary), job.export_name)
        job.storage.write_json(RESULT, _result(model, progress, peaks))


def _result(model: Any, progress: Any, peaks: list[int]) -> dict[str, Any]:
    return {
        "eval_before": progress.eval_before,
        "eval_after": progress.eval_after,
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 3),
        "peak_bytes": peaks,
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "total_parameters": model.num_parameters(),
    }


@contextlib.contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _report(step: int, save: Callable[[Path], None]) -> None:
    """Give Ray Train a checkpoint; it counts once every worker has reported."""
    import ray.train

    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({"step": step})
        return
    with tempfile.TemporaryDirectory() as temporary:
        save(Path(temporary))
        checkpoint = ray.train.Checkpoint.from_directory(temporary)
        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:06d}")


class _MetricsFile:
    """Writes metrics.jsonl whole, a few times a minute at most, so that it can be watched."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._written = 0.0

    def __call__(self, lines: list[dict[str, Any]]) -> None:
        if time.monotonic() - self._written >= METRICS_EVERY_S:
            self._storage.write_jsonl(METRICS, lines)
            self._written = time.monotonic()
