"""Puts together where the teacher's word comes from: in the worker or from a pool, kept or not."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoConfig

from ray_jobs.core.models import resolve_model
from ray_jobs.core.storage import Storage, local_folder
from ray_jobs.distillation.cache import CachedTargets, Kept, KeptHidden, KeptTopK
from ray_jobs.distillation.head import read_head
from ray_jobs.distillation.identity import teacher_identity
from ray_jobs.distillation.pool import PoolTargets
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.targets import LazyTeacher, Targets, WorkerTeacher
from ray_jobs.distillation.topk import TopKCodec, check_temperature
from ray_jobs.training.models import choose_dtype
from ray_jobs.training.ranks import world_size


class Teacher(NamedTuple):
    """A frozen teacher: what decides its word, and how it is loaded; picklable."""

    model: str
    """As `resolve_model` takes it."""
    adapter: str | None
    """PEFT folder or URI."""
    stored_as: str
    """How its linear layers are stored, in words that differ where their numbers do."""
    dtype: str
    """Of its matrix products, as `choose_dtype` takes it."""
    load: Callable[[str], nn.Module]
    """Returns it on a device."""


class Cache(NamedTuple):
    """Where targets are kept, and as what; picklable."""

    folder: str
    keep: str
    dtype: str
    top_k: int
    budget_bytes: int

    @classmethod
    def of(cls, section: Any) -> "Cache | None":
        """Return what the config's [distill.cache] says; None where nothing is to be kept."""
        return cls(*(getattr(section, name) for name in cls._fields)) if section.folder else None


def make_targets(
    teacher: Teacher,
    *,
    device: str,
    pool: Any = None,
    ahead: int = 0,
    cache: Cache | None = None,
    num_rows: int,
    num_tokens: int | None = None,
    layers: Sequence[int] = (),
) -> Targets:
    """Return the targets of one worker.

    Args:
        device: the student's.
        pool: handle of a pool that computes; none computes here.
        ahead: steps for which a pool is asked before they are needed.
        cache: keeps what is computed; none computes each time.
        num_rows: rows of an epoch over all workers.
        layers: of the teacher whose outputs a loss needs; only a teacher in the worker without a cache gives them.
        num_tokens: tokens of the vocabulary where the teacher's head has padding beyond; none takes all.
    """
    folder, adapter = resolve_model(teacher.model), None if teacher.adapter is None else local_folder(teacher.adapter)
    dtype = choose_dtype(teacher.dtype, device)
    load = functools.partial(teacher.load, device)
    load_head = functools.partial(read_head, folder, adapter, dtype=dtype, device=device, load=load)
    inner: Targets
    if pool is not None:
        inner = PoolTargets(pool, load_head, ahead=ahead)
    else:
        inner = WorkerTeacher(load(), layers=layers) if cache is None else LazyTeacher(load, load_head)
    if cache is None:
        return inner
    identity = teacher_identity(folder, adapter, quantization=teacher.stored_as, dtype=str(dtype).removeprefix("torch."))
    settings = AutoConfig.from_pretrained(folder).get_text_config()
    kept, kind = _kept(cache, width=settings.hidden_size, vocabulary=num_tokens or settings.vocab_size)
    store = ShardStore(Storage(cache.folder).sub(identity[:32]).sub(kind), kind=f"{kind} of {identity}", budget_bytes=cache.budget_bytes)
    epoch_rows, whose = math.ceil(num_rows / world_size()), f"the teacher {teacher.model}"
    return CachedTargets(inner, store, identity=identity, kept=kept, epoch_rows=epoch_rows, whose=whose)


def check_cache(folder: str | None, keep: str, *, kd_temperature: float) -> None:
    """Refuse a cache that cannot be written, or a temperature that what it keeps does not reach.

    Raises:
        StorageError: the folder cannot be created or written.
        ConfigError: the temperature is too low for kept tails.
    """
    if folder is None:
        return
    Storage(folder).make()
    if keep == "top_k":
        check_temperature(kd_temperature)


def _kept(cache: Cache, *, width: int, vocabulary: int) -> tuple[Kept, str]:
    """Return what is kept, and the name of its folder."""
    if cache.keep == "top_k":
        return KeptTopK(TopKCodec(cache.top_k, vocabulary)), f"top-{cache.top_k}-of-{vocabulary}"
    return KeptHidden(width, choose_dtype(cache.dtype)), f"hidden-{cache.dtype}"
