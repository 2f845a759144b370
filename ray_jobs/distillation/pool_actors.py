"""The Ray actors of a teacher pool: one that hands out requests, and those that compute.

The coordinator has no CPUs of its own. It hands each request to a teacher actor, asks again where an actor was lost, and
starts and ends actors. What an actor computed goes straight from its node's object store to the worker that asked.
"""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ray_jobs.core.errors import JobError, MemoryLimitExceeded
from ray_jobs.distillation.pool_size import PoolSize
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.batches import Batch

LOSSES = 4
"""Actors that may be lost one after the other without a result between them."""
TICK_S = 1.0
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
_BREACHED = 12


class PoolOptions(NamedTuple):
    """How many teacher actors, and what each may use."""

    min_actors: int = 1
    max_actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 16 * 2**30

    @classmethod
    def of(cls, section: Any) -> "PoolOptions":
        """Return what the config's [distill.pool] says."""
        return cls(*(getattr(section, name) for name in cls._fields))

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray schedules for one actor."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}
        return {name: amount for name, amount in wanted.items() if amount}


class Coordinator:
    """Hands requests to teacher actors; an async actor."""

    def __init__(self, load: Callable[[str], nn.Module], dtype: str, options: PoolOptions, size: PoolSize):
        self._load, self._dtype, self._options, self._size = load, dtype, options, size
        self._all: set[Any] = set()
        self._idle: list[tuple[Any, float]] = []  # the last that worked is the next, so that those too many grow cold
        self._starting = self._losses = self._num_lost = self._most = 0
        self._failure: Exception | None = None
        self._changed: Any = None
        self._tasks: set[Any] = set()

    async def compute(self, arrays: list[Any], waited_s: float) -> list[Any]:
        """Return the reference of what a teacher actor computed, in a list so that it is not fetched here.

        Args:
            arrays: of the micro-batch.
            waited_s: how long who asks has waited since the last time.
        """
        import ray

        self._begin()
        self._size.note_wait(waited_s, now=time.monotonic())
        while True:
            actor = await self._take()
            done, answer = actor.compute.options(num_returns=2).remote(*arrays)
            try:
                await done
            except ray.exceptions.RayActorError as error:
                self._lose(actor, error)
                continue
            except ray.exceptions.RayTaskError:
                pass  # the answer raises it where it is fetched
            self._losses = 0
            await self._put_back(actor)
            return [answer]

    async def give_up(self, message: str) -> None:
        """End the pool: an actor passed its memory limit, and each that replaces it would."""
        await self._fail(MemoryLimitExceeded(message))

    async def facts(self) -> dict[str, int]:
        """Return the most actors at a time, and how many were lost."""
        return {"pool_actors": self._most, "pool_actors_lost": self._num_lost}

    def _begin(self) -> None:
        import asyncio

        if self._changed is None:
            self._changed = asyncio.Condition()
            for _ in range(self._options.min_actors):
                self._start()
            self._run(self._resize())

    def _run(self, coroutine: Any) -> None:
        import asyncio

        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self) -> None:
        import ray

        bundle = self._options.bundle
        limits = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "memory": bundle["memory"]}
        actor_class = ray.remote(TeacherActor).options(**limits, runtime_env={"env_vars": _ENVIRONMENT})
        self._starting += 1
        here = ray.get_runtime_context().current_actor
        actor = actor_class.remote(self._load, self._dtype, self._options, here)
        self._all.add(actor)
        self._run(self._await_ready(actor))

    async def _await_ready(self, actor: Any) -> None:
        import ray

        try:
            await actor.load.remote()
        except ray.exceptions.RayActorError as error:
            self._starting -= 1
            self._lose(actor, error)
            return
        except ray.exceptions.RayTaskError as error:
            self._failure = error.cause if isinstance(error.cause, JobError) else error
        self._starting -= 1
        self._most = max(self._most, len(self._all))
        self._size.note_start(now=time.monotonic())
        await self._put_back(actor)

    async def _take(self) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: self._idle or self._failure)
            if self._failure:
                raise self._failure
            return self._idle.pop()[0]

    async def _put_back(self, actor: Any) -> None:
        async with self._changed:
            self._idle.append((actor, time.monotonic()))
            self._changed.notify_all()

    def _lose(self, actor: Any, error: Exception) -> None:
        self._all.discard(actor)
        self._losses += 1
        self._num_lost += 1
        if self._losses >= LOSSES:
            reason = str(error).strip().splitlines()[-1].strip()
            self._run(
                self._fail(JobError(f"the teacher pool lost {LOSSES} actors one after the other ({reason}); the same command goes on"))
            )
        else:
            self._start()

    async def _fail(self, failure: Exception) -> None:
        self._failure = failure
        async with self._changed:
            self._changed.notify_all()

    async def _resize(self) -> None:
        import asyncio

        import ray

        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            coldest = now - self._idle[0][1] if self._idle else 0.0
            if self._size.grows(len(self._all), starting=self._starting):
                free = ray.available_resources()
                if all(free.get(name, 0) >= amount for name, amount in self._options.bundle.items()):
                    self._start()
            elif self._size.shrinks(len(self._all), coldest_s=coldest):
                actor, _ = self._idle.pop(0)
                self._all.discard(actor)
                ray.kill(actor)


class TeacherActor:
    """The teacher in an actor of its own, held to its memory."""

    def __init__(self, load: Callable[[str], nn.Module], dtype: str, options: PoolOptions, pool: Any):
        self._load, self._dtype, self._options, self._pool = load, dtype, options, pool
        self._device = "cuda" if options.gpus else "cpu"
        self._teacher: WorkerTeacher | None = None
        torch.set_num_threads(max(1, int(options.cpus)))
        if 0 < options.gpus < 1:
            torch.cuda.set_per_process_memory_fraction(options.gpus)

    def load(self) -> None:
        """Load the teacher."""
        with self._limit():
            self._teacher = WorkerTeacher(self._load(self._device))

    def compute(self, *arrays: Any) -> tuple[bool, tuple[Any, torch.dtype]]:
        """Return True, and the hidden states at a micro-batch's valid positions as bytes with their type."""
        from ray_jobs.training.models import choose_dtype
        from ray_jobs.training.strategies.base import autocast

        batch = Batch(*(torch.tensor(array) for array in arrays)).to(self._device)
        with self._limit(), autocast(torch.device(self._device), choose_dtype(self._dtype, self._device)):
            hidden_NH = self._teacher.of(batch).hidden_NH.cpu().contiguous()
        return True, (hidden_NH.view(-1).view(torch.uint8).numpy(), hidden_NH.dtype)

    def _limit(self) -> contextlib.AbstractContextManager[None]:
        from ray_jobs.training.memory import memory_limit

        return memory_limit(self._options.memory_bytes, section="[distill.pool]", on_breach=self._breached)

    def _breached(self, error: MemoryLimitExceeded) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # without the coordinator there is no pool to end
            ray.get(self._pool.give_up.remote(str(error)), timeout=10)
        os._exit(_BREACHED)
