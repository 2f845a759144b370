"""The memory of one worker that distils an encoder, predicted from both models' configs: no weights, no Ray.

The loss itself runs on models and a micro-batch of shapes without memory, and every tensor is counted from its first
operation to its last, as `training/activations.py` does for decoders.
Shapes: B rows, T positions, S texts, K their tokens, N positions with a label.
"""

import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedModel

from ray_jobs.core.errors import ConfigError, ModelError
from ray_jobs.core.sizes import both_units
from ray_jobs.distillation.encoders.load import MODEL_CLASSES
from ray_jobs.distillation.encoders.loss import EncoderLoss, Weights
from ray_jobs.distillation.encoders.rows import MASKED_SHARE
from ray_jobs.distillation.encoders.student import prepare_student
from ray_jobs.distillation.encoders.texts import Texts
from ray_jobs.training.activations import Alive, forget
from ray_jobs.training.alternatives import CLEARLY_LESS, Limits, halves
from ray_jobs.training.batches import Batch
from ray_jobs.training.fit_check import shortage
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.memory_plan import DEVICE_BYTES, PROCESS_BYTES, Memory, Work, optimizer_bytes
from ray_jobs.training.sharding_plan import Sharding, Trained, offload, shard
from ray_jobs.training.skeletons import num_parameters

TEXT_TOKENS = 16
"""Of a text, where prepare has not counted them yet: more texts in a row take no more memory that matters."""
_FLOAT32 = 4


class EncoderRequest(NamedTuple):
    """An encoder's distillation, as far as its memory goes."""

    task: str
    teacher: dict[str, Any]
    """Its config.json."""
    student: dict[str, Any]
    """Its config.json."""
    weights: Weights
    hidden_loss: str
    pairs: Sequence[tuple[int, int]]
    work: Work
    optimizer: str
    sharding: Sharding = Sharding()

    @property
    def name(self) -> str:
        """The job, for people."""
        layers = [settings.get("num_hidden_layers", settings.get("n_layers")) for settings in (self.student, self.teacher)]
        return f"{self.task}, {layers[0]} of {layers[1]} layers"


def predict_encoder(request: EncoderRequest) -> Memory:
    """Return what one worker holds at its peak.

    Raises:
        ModelError: transformers knows no such encoder.
    """
    settings = {name: json.dumps(getattr(request, name)) for name in ("teacher", "student")}
    return _predicted(request._replace(**settings, pairs=tuple(request.pairs)))


@functools.lru_cache(maxsize=64)
def _predicted(key: Any) -> Memory:
    request = key._replace(teacher=json.loads(key.teacher), student=json.loads(key.student))
    work = request.work
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student, loss = _models(request)
        sizes = [parameter.numel() for parameter in student.parameters() if parameter.requires_grad]
        memory = Memory(
            request.name,
            weights=num_parameters(student) * _FLOAT32,
            teacher=num_parameters(loss.teacher) * work.dtype.itemsize,
            gradients=sum(sizes) * _FLOAT32,
            optimizer=optimizer_bytes(sizes, request.optimizer),
            activations=_step_bytes(student, loss, work),
        )
        trained = Trained(sum(sizes), whole=True)
        shapes = {"model": student, "trained": trained, "weight_dtype": torch.float32, "product_dtype": work.dtype}
        memory = shard(memory, request.sharding, **shapes)
    if work.device == "cpu":
        return memory._replace(overhead=PROCESS_BYTES)
    return offload(memory, request.sharding)._replace(overhead=DEVICE_BYTES, host_overhead=PROCESS_BYTES)


def check_encoder_fits(request: EncoderRequest, limits: Limits) -> JobPlan:
    """Return the plan of a job that fits.

    Raises:
        ConfigError: a worker would need more than its limit; names what it needs and the cheapest change.
    """
    plan = plan_encoder(request, limits)
    if not plan.fits:
        raise ConfigError(shortage(request.name, plan, on_gpu=request.work.device == "cuda"))
    return plan


def plan_encoder(request: EncoderRequest, limits: Limits) -> JobPlan:
    """Return what a worker will hold beside what it may, with the cheapest change that fits (or needs clearly less)."""
    memory = predict_encoder(request)
    change = _smallest_change(request, memory, limits)
    return JobPlan(memory.parts, memory.total, limits.limit, change, memory.host_total, limits.host)


def _smallest_change(request: EncoderRequest, now: Memory, limits: Limits) -> str:
    aim = Limits(int(CLEARLY_LESS * now.total), limits.host) if limits.hold(now) else limits
    for text, work in _changes(request.work) if now.total - now.activations <= aim.limit else ():
        if aim.hold(predict_encoder(request._replace(work=work))):
            return text
    field = "memory" if request.work.device == "cpu" or now.host_total > limits.host else "gpu_memory"
    return f"give [workers] {field} at least {both_units(now.host_total if field == 'memory' else now.total)}, or take a smaller model"


def _changes(work: Work) -> Iterator[tuple[str, Work]]:
    """Yield smaller micro-batches, cheapest first: they cost time, or the length of a text."""
    if not work.checkpointing:
        yield "set distill.gradient_checkpointing = true", work._replace(checkpointing=True)
    for rows in halves(work.batch_size, least=1):
        yield f"set distill.micro_batch_size = {rows}", work._replace(batch_size=rows)
    for length in halves(work.length, least=64):
        yield f"set data.max_length = {length}", work._replace(length=length)


def _models(request: EncoderRequest) -> tuple[PreTrainedModel, EncoderLoss]:
    student, teacher = (
        _skeleton(request.task, settings, dtype)
        for settings, dtype in ((request.student, torch.float32), (request.teacher, request.work.dtype))
    )
    width = teacher.config.hidden_size if request.weights.hidden else None
    student = prepare_student(student, task=request.task, teacher_width=width)
    loss = EncoderLoss(teacher, task=request.task, weights=request.weights, hidden_loss=request.hidden_loss, pairs=list(request.pairs))
    return student, loss


def _skeleton(task: str, settings: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    try:
        return MODEL_CLASSES[task].from_config(AutoConfig.for_model(**settings), dtype=dtype, attn_implementation="sdpa")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model_type {settings.get('model_type')!r} is no encoder that transformers knows: {error}") from None


def _step_bytes(student: PreTrainedModel, loss: EncoderLoss, work: Work) -> int:
    """Return the most bytes alive in a micro-batch's forward and backward pass, beside weights and gradients."""
    student.train()
    student.config.use_cache = False
    if work.checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)
    batch, texts = _micro_batch(loss.task, work)
    own = [each for model in (student, loss.teacher) for each in (*model.parameters(), *model.buffers())]
    with Alive(own=own) as alive:
        with torch.autocast("cpu", work.dtype, enabled=work.dtype is not torch.float32):
            taught = loss.states_of_teacher(batch)
            total = loss.between(loss.states(student, batch), taught, texts).total
        del taught
        alive.begin("backward")
        total.backward()
    return max(alive.peaks.values())


def _micro_batch(task: str, work: Work) -> tuple[Batch, Texts]:
    """Return rows full of texts of equal length, and where the texts are, which real rows tell by their values."""
    positions = work.batch_size * work.length
    num_texts = max(1, positions // TEXT_TOKENS)
    num_valid = max(1, round(MASKED_SHARE * positions)) if task == "masked_language_model" else num_texts
    ids_BT = torch.zeros(work.batch_size, work.length, dtype=torch.long)
    texts_S, valid_N = torch.zeros(num_texts, dtype=torch.long), torch.zeros(num_valid, dtype=torch.long)
    token_K = torch.zeros(positions, dtype=torch.long)
    return Batch(ids_BT, ids_BT, ids_BT), Texts(texts_S, token_K, token_K, valid_N, valid_N, texts_S + 1, texts_S)
