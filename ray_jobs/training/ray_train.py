"""The thin Ray Train layer that finetune and distill share: workers, restarts, and what to say when it ends."""

from typing import Any

from ray_jobs.core import errors
from ray_jobs.core.cluster import progress_board, require
from ray_jobs.core.errors import TrainingFailed
from ray_jobs.core.progress import OnProgress
from ray_jobs.core.storage import Storage
from ray_jobs.training.ray_worker import FAILURE, RESULT, TrainingJob, Workers, work

__all__ = ["TrainingJob", "Workers", "fit"]

CHECKPOINTS = "checkpoints"
START_ATTEMPTS = 5
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # a cluster started by others has no such setting (see core.cluster)


def fit(job: TrainingJob, *, workers: Workers, max_failures: int, keep_checkpoints: int, label: str) -> dict[str, Any]:
    """Train on Ray workers, going on from this stage's last checkpoint; needs a connected cluster.

    Returns:
        eval_before and eval_after ({loss, terms, label_tokens} or None), steps, tokens, train_seconds,
        peak_bytes and gpu_peak_bytes (lists, one figure for each rank), trainable_parameters, total_parameters,
        memory ({host, gpu: {limit_bytes, predicted_bytes}}).

    Raises:
        ClusterError: no node can hold a worker.
        MemoryLimitExceeded: a worker passed its limit.
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
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    storage = job.storage
    trainer = TorchTrainer(
        work,
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
