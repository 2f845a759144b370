"""What else could be done: other methods, strategies over more workers, and the smallest change of a config that fits."""

from collections.abc import Iterator
from typing import NamedTuple

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.sizes import both_units
from ray_jobs.training.memory_plan import Memory, Request, predict
from ray_jobs.training.models import Quantization
from ray_jobs.training.pairings import Pairing, refuse_pairing
from ray_jobs.training.sharding_plan import Sharding

WORKER_COUNTS = (1, 2, 4, 8, 16, 32, 64)
STRATEGIES = (
    Sharding("deepspeed", zero_stage=1),
    Sharding("deepspeed", zero_stage=2),
    Sharding("deepspeed", zero_stage=3),
    Sharding("fsdp"),
)
CLEARLY_LESS = 0.95
"""A change is worth naming where it leaves at most this share."""


class Limits(NamedTuple):
    """What one worker may use."""

    limit: int
    """Bytes where the worker computes."""
    host: int
    """Bytes of host memory; the same without a GPU."""

    def hold(self, memory: Memory) -> bool:
        """Whether a worker fits."""
        return memory.total <= self.limit and memory.host_total <= self.host


def methods(request: Request) -> list[Request]:
    """Return the fine-tuning jobs on the same model and micro-batch: full, LoRA, int8, 4 bits, 4 bits with double quantization."""
    kind = request.quantization.type if request.quantization.type != "int8" else "nf4"
    stored = [
        Quantization("int8", double_quantization=False),
        *(Quantization(kind, double_quantization=double) for double in (False, True)),
    ]
    plain = [request._replace(method=method) for method in ("full", "lora")]
    return [*plain, *(request._replace(method="qlora", quantization=quantization) for quantization in stored)]


class OverWorkers(NamedTuple):
    """One strategy's memory by worker count."""

    sharding: Sharding
    memories: list[Memory]
    """One for each of WORKER_COUNTS, up to the first that fits; empty where the job cannot start."""
    obstacle: str
    """Why it cannot start, or ""."""


def over_workers(request: Request, limits: Limits) -> list[OverWorkers]:
    """Return each strategy's memory by worker count, up to the first count that fits."""
    return [_over_workers(request._replace(sharding=strategy), limits) for strategy in STRATEGIES]


def _over_workers(request: Request, limits: Limits) -> OverWorkers:
    found = OverWorkers(request.sharding, [], obstacle(request, limits))  # the same for any number of workers
    for count in WORKER_COUNTS if not found.obstacle else ():
        found.memories.append(predict(request._replace(sharding=request.sharding._replace(workers=count))))
        if limits.hold(found.memories[-1]):
            break
    return found


def obstacle(request: Request, limits: Limits) -> str:
    """Return why a job cannot start, whatever its peak in training; "" where nothing stands in its way.

    Settings that cannot work together, or shards of a model that no worker can read whole, where each does before it is cut.
    """
    sharding = request.sharding
    storage, dora = request.quantization.type, request.lora.dora
    try:
        refuse_pairing(Pairing(sharding.strategy, sharding.zero_stage, request.optimizer, request.method, storage, dora))
    except ConfigError as error:
        return str(error)
    if not sharding.cuts_parameters or _is_read_in_pieces(request):
        return ""
    whole = predict(request._replace(sharding=Sharding()))
    size = whole.weights + whole.constants + whole.teacher
    if size <= limits.limit:
        return ""
    field = "memory" if request.work.device == "cpu" else "gpu_memory"
    return (
        f"each worker reads the whole model, {both_units(size)}, before {sharding.name} cuts it, and [workers] {field} gives "
        f"{both_units(limits.limit)}: give at least that much, store the base in fewer bits, or take a smaller model"
    )


def _is_read_in_pieces(request: Request) -> bool:
    return request.teaching is None and request.method in {"full", "lora"} and not request.lora.dora


def smallest_change(request: Request, limits: Limits) -> str:
    """Return the cheapest single change of the config that fits, or where the job fits already, that needs clearly less.

    Tried in the order of what they cost: time, then precision, then length, then machines.
    """
    now = predict(request)
    if limits.hold(now):
        limits = Limits(int(CLEARLY_LESS * now.total), limits.host)
    standing = now.total - now.activations - now.logits
    for text, changed in _changes(request, smaller_batches=standing <= limits.limit):
        if limits.hold(predict(changed)) and not obstacle(changed, limits):
            return text
    field = "memory" if request.work.device == "cpu" or now.host_total > limits.host else "gpu_memory"
    needed = now.host_total if field == "memory" else now.total
    return f"give [workers] {field} at least {both_units(needed)}, or take a smaller model"


def _changes(request: Request, *, smaller_batches: bool) -> Iterator[tuple[str, Request]]:
    section, work = "finetune" if request.teaching is None else "distill", request.work
    if smaller_batches and not work.checkpointing:
        yield f"set {section}.gradient_checkpointing = true", request._replace(work=work._replace(checkpointing=True))
    if smaller_batches:
        for rows in halves(work.batch_size, least=1):
            yield f"set {section}.micro_batch_size = {rows}", request._replace(work=work._replace(batch_size=rows))
    yield from _smaller_teachers(request)
    if request.method in {"full", "lora"}:
        yield f'set {section}.method = "qlora"', request._replace(method="qlora")
    if request.method == "qlora" and not request.quantization.double_quantization:
        double = request.quantization._replace(double_quantization=True)
        yield f"set {section}.quantization.double_quantization = true", request._replace(quantization=double)
    if smaller_batches:
        for length in halves(work.length, least=64):
            yield f"set data.max_length = {length}", request._replace(work=work._replace(length=length))
    if request.sharding.strategy == "ddp":
        for count in WORKER_COUNTS[1:]:
            yield f'set workers.strategy = "fsdp" with workers.num_workers = {count}', request._replace(sharding=Sharding("fsdp", count))


def _smaller_teachers(request: Request) -> Iterator[tuple[str, Request]]:
    teaching = request.teaching
    if teaching is not None and teaching.place == "worker" and teaching.quantization is None:
        stored = teaching._replace(quantization=Quantization("nf4"))
        yield 'set distill.teacher_quantization = "nf4"', request._replace(teaching=stored)
        yield 'set distill.targets = "pool"', request._replace(teaching=teaching._replace(place="head"))


def halves(count: int, *, least: int) -> Iterator[int]:
    """Yield a count's half, its half and so on, down to the least that is allowed."""
    while (count := count // 2) >= least:
        yield count
