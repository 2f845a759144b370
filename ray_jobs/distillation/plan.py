"""The memory plan of a distillation: its workers, the actors of its pool, and what its cache takes on disk."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.sizes import both_units
from ray_jobs.distillation.topk import TopKCodec
from ray_jobs.training.alternatives import Limits
from ray_jobs.training.fit_check import request_of
from ray_jobs.training.memory_plan import Memory, Request, plan_teacher
from ray_jobs.training.models import Quantization
from ray_jobs.training.skeletons import skeleton_of
from ray_jobs.training.teaching_plan import Teaching

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class CachePlan(NamedTuple):
    """What [distill.cache] keeps."""

    bytes_per_token: int
    """Of each trained token."""
    tokens: int | None
    """Trained tokens, where prepare has counted them."""
    budget: int

    @property
    def total(self) -> int | None:
        """Bytes on disk once all is kept."""
        return None if self.tokens is None else self.tokens * self.bytes_per_token

    @property
    def line(self) -> str:
        """The plan for people."""
        kept = f"cache: {self.bytes_per_token} bytes a trained token"
        if self.total is None:
            return f"{kept} of a budget of {both_units(self.budget)}; tokens unknown until prepare has counted them"
        fits = "fits" if self.total <= self.budget else f"does not fit: {1 - self.budget / self.total:.0%} are computed each time"
        return f"{kept}, {both_units(self.total)} for {self.tokens} of them; distill.cache.budget gives {both_units(self.budget)}: {fits}"


def distill_request(
    section: dict[str, Any],
    finetuned: dict[str, Any],
    *,
    teacher: dict[str, Any],
    student: dict[str, Any],
    length: int,
    workers: Any,
    others: Sequence[dict[str, Any]] = (),
) -> Request:
    """Return the job of one worker.

    Args:
        section: fields of [distill].
        finetuned: fields of [finetune], which trained the teacher.
        teacher: its config.json.
        student: its config.json.
        length: tokens of a packed row.
        workers: has the fields of [workers].
        others: config.json of each further teacher.
    """
    kind, layers = section["teacher_quantization"], section["hidden_layers"]
    stored = None if kind == "none" else Quantization(kind, finetuned["quantization"]["double_quantization"])
    num_layers = skeleton_of(student).config.num_hidden_layers
    pairs = {"last": 1, "mapped": num_layers}[layers] if isinstance(layers, str) else len(layers)
    teaching = Teaching(
        teacher,
        place={"worker": "worker", "pool": "head", "text": "none"}[section["targets"]],
        quantization=stored,
        adapter_rank=finetuned["lora"]["rank"] if stored and finetuned["method"] != "full" else 0,
        hidden_pairs=pairs if section["hidden_weight"] else 0,
        others=tuple(others),
    )
    return request_of(section, settings=student, length=length, workers=workers, teaching=teaching)


def beside_workers(
    section: dict[str, Any], request: Request, *, teacher: dict[str, Any], tokens: int | None, given: dict[str, int]
) -> dict[str, Any]:
    """Return what a distillation takes beside its workers, as `facts` and as `lines`: its pool's actors, its cache.

    Args:
        section: fields of [distill].
        request: of one worker.
        teacher: its config.json.
        tokens: trained and held-out ones, where they have been counted.
        given: bytes of `pool.memory` and `cache.budget`, as pool and cache.
    """
    facts: dict[str, Any] = {}
    lines = []
    if section["targets"] == "pool":
        memory = pool_plan(request, gpus=section["pool"]["gpus"])
        fits = memory.host_total <= given["pool"]
        facts["pool"] = {"total": memory.total, "host_total": memory.host_total, "teacher": memory.teacher, "fits": fits}
        gpu = f", {both_units(memory.total)} on its GPU" if section["pool"]["gpus"] else ""
        lines.append(
            f"  pool: an actor holds {both_units(memory.host_total)}{gpu}, {both_units(memory.teacher)} of it the teacher; "
            f"distill.pool.memory gives {both_units(given['pool'])}: {'fits' if fits else 'does not fit'}"
        )
    if section["cache"]["folder"] is not None:
        teachers = [teacher, *(request.teaching.others if request.teaching else ())]
        kept = cache_plan(section["cache"], teachers=teachers, tokens=tokens, budget=given["cache"])
        facts["cache"] = {**kept._asdict(), "total": kept.total}
        lines.append(f"  {kept.line}" + (" (if each teacher taught all of them)" if len(teachers) > 1 else ""))
    return {"facts": facts, "lines": lines}


def pool_plan(request: Request, *, gpus: float) -> Memory:
    """Return what one actor of [distill.pool] holds when it is asked for the micro-batches of a distillation: of the largest teacher's.

    Args:
        gpus: of one actor.
    """
    if request.teaching is None:
        raise ValueError(f"{request.name} has no teacher, so it has no pool")
    work = request.work._replace(device="cuda" if gpus else "cpu")
    actors = (plan_teacher(each._replace(place="worker"), work) for each in request.teaching.each)
    return max(actors, key=lambda memory: memory.total)


def check_pool(memory: Memory, limits: Limits) -> None:
    """Refuse actors that cannot hold the teacher.

    Args:
        memory: of one actor.
        limits: of its GPU, and `distill.pool.memory`.

    Raises:
        ConfigError: names what it needs and what it is given.
    """
    if not limits.hold(memory):
        on_host = memory.host_total > limits.host
        needed, given = (memory.host_total, limits.host) if on_host else (memory.total, limits.limit)
        raise ConfigError(
            f"an actor of [distill.pool] needs {both_units(needed)}, {both_units(memory.teacher)} of it the teacher, and "
            f"{'distill.pool.memory' if on_host else '[workers] gpu_memory'} gives {both_units(given)}: give more, "
            'set distill.teacher_quantization = "nf4", or a smaller distill.micro_batch_size'
        )


def cache_plan(cache: dict[str, Any], *, teachers: Sequence[dict[str, Any]], tokens: int | None, budget: int) -> CachePlan:
    """Return what the cache takes where every token is kept of each teacher.

    Args:
        cache: fields of [distill.cache].
        teachers: their config.json.
        tokens: trained and held-out ones, where they have been counted.
        budget: of the cache in bytes.
    """
    configs = [skeleton_of(teacher).config for teacher in teachers]
    if cache["keep"] == "hidden":
        return CachePlan(sum(config.hidden_size for config in configs) * _ITEM_BYTES[cache["dtype"]], tokens, budget)
    return CachePlan(sum(TopKCodec(cache["top_k"], config.vocab_size).bytes_per_position for config in configs), tokens, budget)
