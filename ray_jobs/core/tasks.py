"""Functions as Ray tasks: with the resources a job gives a worker, and with their errors as they were raised."""

from collections.abc import Callable
from typing import Any

from ray_jobs.core.errors import JobError


def start_task(function: Callable[..., Any], *arguments: Any, bundle: dict[str, float], environment: dict[str, str] | None = None) -> Any:
    """Return the reference of a function that runs as a task of its own; needs a connected cluster.

    Args:
        bundle: CPU, GPU (none where it is left out) and memory in bytes.
        environment: variables of the task's process.
    """
    import ray

    options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "memory": bundle["memory"]}
    return ray.remote(function).options(**options, runtime_env={"env_vars": environment or {}}).remote(*arguments)


def task_results(references: list[Any], *, what: str) -> list[Any]:
    """Return what the tasks returned, in order.

    Args:
        what: the job they belong to, for the message.

    Raises:
        Exception: as the first task that raised one.
        JobError: a task's process or node is gone.
    """
    import ray

    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise lost_task(what, error) from error


def lost_task(what: str, error: Exception) -> JobError:
    """Return in one line what Ray says of a task whose process or node is gone."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return JobError(f"{what} lost a task ({type(error).__name__}): {lines[0]}; the same command goes on with what is not there yet")
