"""What one training worker will hold in memory, from a model's config alone: no weights, no Ray."""

import functools
import json
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ray_jobs.training.activations import Phases, simulate, store_quantized
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.models import Quantization
from ray_jobs.training.sharding_plan import Sharding, Trained, offload, shard
from ray_jobs.training.skeletons import linear_layers, num_parameters, skeleton_of, weight_bytes
from ray_jobs.training.teaching_plan import Teaching, teaching_bytes

PROCESS_BYTES = 640 * 2**20
"""Host memory of a worker before it has a model: Python with torch, transformers, PEFT and Ray (docs/memory.md)."""
DEVICE_BYTES = 1000 * 2**20
"""Allowance on a GPU for the CUDA context, the libraries' workspaces and the allocator's rounding."""
_FLOAT32 = 4
_ADAM_BYTES = 8  # two float32 moments
_SMALL = 4096  # bitsandbytes keeps moments of smaller tensors in float32


class Memory(NamedTuple):
    """Bytes of one worker, by what they hold."""

    method: str
    weights: int = 0
    constants: int = 0
    """Quantization constants."""
    teacher: int = 0
    """The frozen teacher's weights, where there is one."""
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    buckets: int = 0
    """Gradients on their way between workers."""
    gathered: int = 0
    """Parameters put together from the workers' shards for the layers at work."""
    activations: int = 0
    """What the forward pass keeps for the backward pass, or where that is more, what the backward pass needs at its peak."""
    logits: int = 0
    """Scores over the vocabulary that are alive at once, with their gradients and those of the head."""
    overhead: int = 0
    offloaded: int = 0
    """In host memory, beside a GPU: what the strategy or a paged optimizer keeps there."""
    host_overhead: int = 0
    """In host memory, beside a GPU: the process."""

    @property
    def parts(self) -> dict[str, int]:
        """Bytes where the worker computes, largest first; nothing that is zero."""
        parts = {name: value for name, value in self._asdict().items() if name in PARTS and value}
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    @property
    def total(self) -> int:
        """All of it where the worker computes: GPU memory with a GPU, host memory without."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> int:
        """Host memory."""
        return self.offloaded + self.host_overhead if self.host_overhead else self.total


PARTS = tuple(name for name in Memory._fields if name not in {"method", "offloaded", "host_overhead"})


class Work(NamedTuple):
    """The size of a micro-batch, and how it is computed."""

    batch_size: int
    length: int
    dtype: torch.dtype
    checkpointing: bool
    device: str = "cpu"


class Lora(NamedTuple):
    """The adapter's size."""

    rank: int
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False


class Request(NamedTuple):
    """A training job, as far as its memory goes."""

    settings: dict[str, Any]
    """The config.json of the model to train."""
    method: str
    """full, lora or qlora."""
    work: Work
    lora: Lora = Lora(16)
    quantization: Quantization = Quantization()
    optimizer: str = "adamw"
    teaching: Teaching | None = None
    """The teacher in distillation."""
    sharding: Sharding = Sharding()

    @property
    def name(self) -> str:
        """The method, for people."""
        if self.teaching is not None:
            layers = [settings.get("num_hidden_layers", settings.get("n_layer")) for settings in (self.settings, self.teaching.settings)]
            kind = "" if self.method == "full" else f", {self._replace(teaching=None).name}"
            many = f", {len(self.teaching.each)} teachers" if self.teaching.others else ""
            return f"distillation, {layers[0]} of {layers[1]} layers{many}{kind}"
        work = _name(self.work.dtype)
        if self.method == "full":
            return f"full, float32 with {work} products" if self.work.dtype is not torch.float32 else "full, float32"
        kind = "DoRA" if self.lora.dora else "LoRA"
        if self.method == "lora":
            return f"{kind} r={self.lora.rank}, {work}"
        double = " + DQ" if self.quantization.double_quantization and self.quantization.type != "int8" else ""
        return f"Q{kind} r={self.lora.rank}, {self.quantization.type.upper().replace('INT', 'int')}{double}"


def predict(request: Request) -> Memory:
    """Return what one worker of a job holds at its peak.

    Raises:
        ConfigError: a LoRA target is no linear module, or the rank is larger than a layer.
        ModelError: transformers knows no such causal language model.
    """
    model, trained, unsharded = _without_workers(request)
    phases = _phases(request)
    dtype = request.work.dtype if request.method != "full" else torch.float32
    memory = shard(unsharded, request.sharding, model=model, trained=trained, weight_dtype=dtype, product_dtype=request.work.dtype)
    memory = memory._replace(logits=phases.scores, activations=max(phases.saved, phases.peak - phases.scores))
    if request.teaching is not None:
        memory = _with_teacher(memory, request, phases)
    if request.work.device == "cpu":
        return memory._replace(overhead=PROCESS_BYTES)
    if request.optimizer.startswith("paged"):  # unified memory: the driver moves it out when the GPU runs full
        memory = memory._replace(optimizer=0, offloaded=memory.offloaded + memory.optimizer)
    return offload(memory, request.sharding)._replace(overhead=DEVICE_BYTES, host_overhead=PROCESS_BYTES)


def plan_base(settings: dict[str, Any], *, dtype: torch.dtype, device: str = "cpu") -> Memory:
    """Return what the untrained model takes to answer with: weights in `dtype`."""
    weights = num_parameters(_skeleton(json.dumps(settings))) * dtype.itemsize
    memory = Memory(f"base, {_name(dtype)}", weights=weights, overhead=PROCESS_BYTES)
    return memory if device == "cpu" else memory._replace(overhead=DEVICE_BYTES, host_overhead=PROCESS_BYTES)


def trained_sizes(request: Request) -> tuple[int, ...]:
    """Return how many numbers each trained tensor has."""
    return _sizes(_key(request, work=Work(1, 1, request.work.dtype, False)))


def optimizer_bytes(sizes: Sequence[int], optimizer: str) -> int:
    """Return the bytes of AdamW's state for tensors of so many numbers.

    Source:
        Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments with a float32 scale for each block of 256).
    """
    if optimizer == "adamw":
        return sum(sizes) * _ADAM_BYTES
    return sum(2 * (size + -(-size // 256) * _FLOAT32) if size >= _SMALL else size * _ADAM_BYTES for size in sizes)


def plan_teacher(teaching: Teaching, work: Work) -> Memory:
    """Return what a process takes that only answers with the teacher's hidden states, as the actors of a pool do."""
    taught = teaching_bytes(teaching, student_width=0, **_of_work(work))
    states = work.batch_size * work.length * _skeleton(json.dumps(teaching.settings)).config.hidden_size * work.dtype.itemsize
    memory = Memory("teacher of a pool", teacher=taught.teacher, activations=taught.forward + states, overhead=PROCESS_BYTES)
    return memory if work.device == "cpu" else memory._replace(overhead=DEVICE_BYTES, host_overhead=PROCESS_BYTES)


def _with_teacher(memory: Memory, request: Request, phases: Phases) -> Memory:
    """Add the teacher: its forward pass meets what the student's has saved, and its scores those of the student."""
    config = _skeleton(json.dumps(request.settings)).config
    taught = teaching_bytes(request.teaching, student_width=config.hidden_size, **_of_work(request.work))  # type: ignore[arg-type]
    scores = phases.scores + taught.scores
    activations = taught.kept + max(phases.saved, phases.peak - scores, phases.saved + taught.forward - scores)
    return memory._replace(teacher=taught.teacher, logits=scores, activations=activations)


def _of_work(work: Work) -> dict[str, Any]:
    return {"batch_size": work.batch_size, "length": work.length, "dtype": work.dtype, "device": work.device}


def _without_workers(request: Request) -> tuple[PreTrainedModel, Trained, Memory]:
    """Return the shapes of the model that is trained, what is trained of it, and the parts that do not depend on the micro-batch."""
    sizes = trained_sizes(request)
    trained = Trained(sum(sizes), whole=request.method == "full")
    model = _skeleton(json.dumps(request.settings))
    memory = Memory(request.name, gradients=trained.numbers * _FLOAT32, optimizer=optimizer_bytes(sizes, request.optimizer))
    if trained.whole:
        return model, trained, memory._replace(weights=trained.numbers * _FLOAT32)
    stored = weight_bytes(model, dtype=request.work.dtype, quantization=request.quantization if request.method == "qlora" else None)
    return model, trained, memory._replace(weights=stored.weights, constants=stored.constants, adapter=trained.numbers * _FLOAT32)


def _phases(request: Request) -> Phases:
    num_layers = _skeleton(json.dumps(request.settings)).config.num_hidden_layers
    return _simulated(_key(request, work=request.work._replace(device="cpu")), num_layers)


def _key(request: Request, *, work: Work) -> Any:
    """Return a hashable request, the same for jobs that differ only in what shapes and the micro-batch do not depend on."""
    return Request(json.dumps(request.settings), request.method, work, request.lora)  # type: ignore[arg-type]


def _from_key(key: Any) -> Request:
    return key._replace(settings=json.loads(key.settings))


@functools.lru_cache(maxsize=16)
def _skeleton(settings: str) -> PreTrainedModel:
    return skeleton_of(json.loads(settings))


@functools.lru_cache(maxsize=64)
def _sizes(key: Any) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in _build(_from_key(key), None).parameters() if parameter.requires_grad)


@functools.lru_cache(maxsize=256)
def _simulated(key: Any, num_layers: int) -> Phases:
    request, work = _from_key(key), key.work
    return simulate(
        lambda layers: _build(request, layers),
        num_layers=num_layers,
        batch_size=work.batch_size,
        length=work.length,
        dtype=work.dtype,
        checkpointing=work.checkpointing,
    )


def _build(request: Request, num_layers: int | None) -> nn.Module:
    if request.method == "full":
        return skeleton_of(request.settings, num_layers=num_layers)
    model = skeleton_of(request.settings, num_layers=num_layers, dtype=request.work.dtype)
    layers, lora = linear_layers(model), request.lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft's calls into transformers
        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        adapted = add_lora(model, rank=lora.rank, alpha=lora.rank, dropout=0.0, targets=targets, dora=lora.dora)
    if request.method == "qlora":
        store_quantized(layers, request.work.dtype)
    return adapted


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
