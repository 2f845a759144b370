"""A pool whose workers die each time ends in one line; what a worker raised passes as it is."""

import pytest
import ray

from ray_jobs.core.cluster import RETRIES, name_lost_workers
from ray_jobs.core.errors import DataError, JobError


def test_a_worker_that_dies_each_time_is_one_line_naming_the_stage():
    with (
        pytest.raises(JobError, match=r"^prepare \(ReadFile\): a worker died 4 times .*its process has died"),
        name_lost_workers("prepare (ReadFile)"),
    ):
        raise ray.exceptions.OutOfMemoryError("The worker was killed.\n\tclass_name: X\n its process has died\n")


def test_other_errors_pass():
    with pytest.raises(DataError, match="as it is"), name_lost_workers("prepare"):
        raise DataError("as it is")
    with pytest.raises(ray.exceptions.RayTaskError), name_lost_workers("prepare"):
        raise ray.exceptions.RayTaskError("f", "traceback", ValueError("a bug"))


def test_ray_data_takes_the_bounds_under_these_names():
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    applied = ActorPoolMapOperator._apply_default_remote_args(RETRIES, ray.data.DataContext())
    assert {key: applied[key] for key in RETRIES} == RETRIES
