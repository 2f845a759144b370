"""A pool of Ray actors, anywhere in the cluster, that computes the teacher's hidden states ahead of the students.

The pool belongs to the driver: it outlives the training workers, which all share it, and ends with the job. No teacher is
started before somebody asks.

Shapes: N valid positions, H width.
"""

import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ray_jobs.core.cluster import require_together
from ray_jobs.core.errors import JobError
from ray_jobs.distillation.pool_actors import Coordinator, PoolOptions
from ray_jobs.distillation.pool_size import PoolSize
from ray_jobs.distillation.targets import HiddenTarget
from ray_jobs.training.batches import Batch

RESTARTS = 3
"""Times that the coordinator is replaced; what it was asked is asked again."""
ATTEMPTS = 4
MOST_PENDING = 256
"""Answers that nobody fetched; older ones are let go."""


@contextlib.contextmanager
def teacher_pool(load: Callable[[str], nn.Module], *, dtype: str, options: PoolOptions, size: PoolSize | None = None) -> Iterator[Any]:
    """Yield the handle of a pool for `PoolTargets`, picklable; needs a connected cluster.

    Args:
        load: returns the teacher on a device; module-level, or a partial of such a function.
        dtype: of its matrix products, as `choose_dtype` takes it.
        size: decides when actors start and end; none is that of the options.
    """
    import ray

    limits = {"num_cpus": 0, "max_restarts": RESTARTS, "max_concurrency": 1000}
    pool = ray.remote(Coordinator).options(**limits).remote(load, dtype, options, size or PoolSize(options.min_actors, options.max_actors))
    try:
        yield pool
    finally:
        ray.kill(pool)  # its actors are its own, and end with it


@contextlib.contextmanager
def job_pools(section: Any, workers: Any, loads: Mapping[str, Callable[[str], nn.Module]]) -> Iterator[dict[str, Any]]:
    """Hold a pool of each teacher for as long as a job, as its config says, and yield them by name; none where teachers are in the workers.

    Args:
        section: the config's [distill].
        workers: its [workers].
        loads: return the teachers on a device, by name.

    Raises:
        ClusterError: pools and workers do not fit beside each other.
    """
    if section.targets != "pool":
        yield {}
        return
    options = PoolOptions.of(section.pool)
    actors = ("[distill.pool]", options.bundle, options.min_actors * len(loads))
    require_together([("[workers] of distill", workers.bundle, workers.min_workers), actors])
    with contextlib.ExitStack() as stack:
        pools = {name: teacher_pool(load, dtype=section.teacher_dtype, options=options) for name, load in loads.items()}
        yield {name: stack.enter_context(pool) for name, pool in pools.items()}


class PoolTargets:
    """The teacher's word from a pool.

    Args:
        pool: the handle that `teacher_pool` yields.
        load_head: returns the teacher's output embedding on the student's device.
        ahead: steps whose targets are asked for before the student needs them.
    """

    def __init__(self, pool: Any, load_head: Callable[[], Tensor], *, ahead: int):
        self._pool, self._load_head, self.ahead = pool, load_head, ahead
        self._head_VH: Tensor | None = None
        self._pending: OrderedDict[bytes, Any] = OrderedDict()
        self.waited_s = self._told_s = 0.0

    def head(self) -> Tensor:
        """Return the teacher's output embedding."""
        if self._head_VH is None:
            self._head_VH = self._load_head()
        return self._head_VH

    def announce(self, batches: list[Batch]) -> None:
        """Ask for micro-batches ahead."""
        for batch in batches:
            key = _key(batch)
            if batch.num_valid and key not in self._pending:
                self._pending[key] = self._ask(batch)
        while len(self._pending) > MOST_PENDING:
            self._pending.popitem(last=False)

    def of(self, batch: Batch) -> HiddenTarget:
        """Return the target at the batch's valid positions, and count the time that it was waited for.

        Raises:
            JobError: as a teacher actor raised it; or actors were lost again and again.
        """
        head_VH, on_host = self.head(), batch.to("cpu")
        if not batch.num_valid:
            return HiddenTarget(head_VH.new_empty(0, head_VH.shape[1]), head_VH)
        began = time.perf_counter()
        answer = self._fetch(self._pending.pop(_key(on_host), None), on_host)
        self.waited_s += time.perf_counter() - began
        hidden = torch.from_numpy(answer[0].copy()).view(answer[1])  # a copy, as the object store's memory is shared and read-only
        return HiddenTarget(hidden.view(-1, head_VH.shape[1]).to(head_VH.device), head_VH)

    def probe(self, batch: Batch) -> HiddenTarget:
        """Return the target of a batch that is not trained on."""
        return self.of(batch)

    def flush(self) -> None:
        """Do nothing: nothing is kept."""

    def release(self) -> None:
        """Do nothing: idle actors end by themselves."""

    def counts(self) -> dict[str, float]:
        """Return nothing: each batch is computed."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return how many actors the pool had at most, and how many it lost."""
        import ray

        return ray.get(self._pool.facts.remote())

    def _ask(self, batch: Batch) -> Any:
        waited, self._told_s = self.waited_s - self._told_s, self.waited_s
        return self._pool.compute.remote([tensor.numpy() for tensor in _tensors(batch)], waited)

    def _fetch(self, asked: Any, batch: Batch) -> Any:
        import ray

        for _ in range(ATTEMPTS):
            try:
                return ray.get(ray.get(asked if asked is not None else self._ask(batch))[0])
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, JobError) else error) from None
            except ray.exceptions.RayError as error:  # the coordinator, or the node that held the answer, is gone
                asked, lost = None, error
        raise JobError(f"the teacher pool gave no answer {ATTEMPTS} times ({type(lost).__name__}: {lost}); the same command goes on")


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT


def _key(batch: Batch) -> bytes:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in _tensors(batch))).digest()
