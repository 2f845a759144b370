"""The thin Ray Train layer that finetune and distill share: workers, restarts, and what to say when it ends."""

from typing import Any

from ray_jobs.core import errors
from ray_jobs.core.cluster import progress_board, require
from ray_jobs.core.errors import JobError, StorageError, TrainingFailed
from ray_jobs.core.interrupts import interrupts_of_ray_train
from ray_jobs.core.progress import OnProgress
from ray_jobs.core.storage import Storage
from ray_jobs.training.ray_worker import CHECKPOINTS, FAILURE, RESULT, TrainingJob, Workers, work

__all__ = ["TrainingJob", "Workers", "fit"]

REGISTER = f"{CHECKPOINTS}/checkpoint_manager_snapshot.json"
START_ATTEMPTS = 5
GROW_CHECK_S = 60.0
"""Time between looks for room for more workers, up to `max_workers`: growing restarts them all from the last checkpoint."""
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # a cluster started by others has no such setting (see core.cluster)


def fit(job: TrainingJob, *, workers: Workers, max_failures: int, keep_checkpoints: int, label: str) -> dict[str, Any]:
    """Train on Ray workers, going on from this stage's last checkpoint; needs a connected cluster.

    Returns:
        eval_before and eval_after ({loss, terms, label_tokens} or None), steps, tokens, train_seconds,
        peak_bytes and gpu_peak_bytes (lists, one figure for each rank), trainable_parameters, total_parameters,
        memory ({host, gpu: {limit_bytes, predicted_bytes}}), loss_counts and loss_facts (see `LossHooks`).

    Raises:
        ClusterError: no node can hold a worker.
        MemoryLimitExceeded: a worker passed its limit.
        StorageError: the disk is full, or too small for the checkpoints.
        TrainingFailed: workers were lost more than `max_failures` times, or the loss is not finite.
    """
    storage = job.storage
    if not storage.exists(RESULT):
        require(f"[workers] of {label}", workers.bundle, workers.min_workers)
        storage.delete(FAILURE)
        with progress_board(label, "step", each_note=True) as on_progress:
            _run(job, workers, max_failures, keep_checkpoints, on_progress)
    storage.delete(CHECKPOINTS)
    return storage.read_json(RESULT)


def _run(job: TrainingJob, workers: Workers, max_failures: int, keep_checkpoints: int, on_progress: OnProgress) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from ray_jobs.training.full_disk import full_disk, is_full

    storage = job.storage
    _drop_torn_register(storage)
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job, "workers": workers, "keep_checkpoints": keep_checkpoints, "on_progress": on_progress},
        scaling_config=_scaling(workers),
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
        with interrupts_of_ray_train():
            trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        _raise_known(storage, error)
        if is_full(error):  # Ray itself writes there, too
            raise StorageError(full_disk(storage, error)) from error
        raise TrainingFailed(f"training failed after {max_failures} restarts: {_reason(error)}; the same command goes on") from error
    _raise_known(storage)


def _scaling(workers: Workers) -> Any:
    from ray.train import ScalingConfig

    fewest, most = workers.min_workers, workers.max_workers
    return ScalingConfig(
        num_workers=fewest if fewest == most else (fewest, most),
        use_gpu=workers.gpus > 0,
        resources_per_worker=workers.bundle,
        elastic_resize_monitor_interval_s=GROW_CHECK_S,
    )


def _drop_torn_register(storage: Storage) -> None:
    """Delete Ray's register of checkpoints where it is torn: Ray would refuse to start, but the checkpoints tell of themselves."""
    if storage.exists(REGISTER):
        try:
            storage.read_json(REGISTER)
        except ValueError:
            storage.delete(REGISTER)


def _raise_known(storage: Storage, error: Exception | None = None) -> None:
    """Raise what a worker raised on purpose: as it wrote it down, or, where it could not write, as it was raised."""
    if storage.exists(FAILURE):
        failure = storage.read_json(FAILURE)
        storage.delete(FAILURE)
        raise getattr(errors, failure["error"])(failure["message"])
    for cause in getattr(error, "worker_failures", {}).values():
        if isinstance(cause, JobError):
            raise cause


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    return "; ".join(f"worker {rank}: {str(failure).strip().splitlines()[-1]}" for rank, failure in failures.items())
