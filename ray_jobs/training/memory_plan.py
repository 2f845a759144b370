"""What one training worker will hold in memory, from a model's config alone: no weights, no Ray.

Shapes: N positions of a micro-batch, C positions of one chunk, H width, V vocabulary.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ray_jobs.core.errors import ModelError
from ray_jobs.training.activations import activation_bytes
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.losses import CHUNK_POSITIONS
from ray_jobs.training.models import Quantization

BLOCK = 64
"""Weights that share one quantization constant (bitsandbytes' default)."""
OUTER_BLOCK = 256
"""Constants that share one constant of their own under double quantization."""
OVERHEAD_BYTES = {"cpu": 750 * 2**20, "cuda": 1000 * 2**20}
"""Python with torch, transformers and Ray, and on a GPU the CUDA context with its workspaces."""
_ADAM_BYTES = 8  # two float32 moments
_FLOAT32 = 4


class Memory(NamedTuple):
    """Bytes of one worker, by what they hold."""

    method: str
    weights: int = 0
    constants: int = 0
    """Quantization constants of 4-bit weights."""
    teacher: int = 0
    """The frozen teacher's weights, where there is one."""
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    """Scores over the vocabulary that are alive at once, with their gradient."""
    overhead: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self[1:])


class Work(NamedTuple):
    """The size of a micro-batch, and how it is computed."""

    batch_size: int
    length: int
    dtype: torch.dtype
    checkpointing: bool
    device: str = "cpu"

    @property
    def positions(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.length


class Lora(NamedTuple):
    """The adapter's size."""

    rank: int
    targets: str | list[str] = "all-linear"


def skeleton_of(settings: dict[str, Any], *, num_layers: int | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a causal language model on the meta device: shapes without weights.

    Args:
        settings: fields of config.json.
        num_layers: takes the place of num_hidden_layers.
        dtype: type of the weights.

    Raises:
        ModelError: transformers knows no such causal language model.
    """
    changes = {"num_hidden_layers": num_layers, "layer_types": None} if num_layers else {}
    try:
        config = AutoConfig.for_model(**{**settings, **changes})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model_type {settings.get('model_type')!r} is no causal language model that transformers knows: {error}"
        ) from None


def num_parameters(model: nn.Module) -> int:
    """Return the parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_linear(model: PreTrainedModel) -> int:
    """Return the weights that 4-bit storage takes: those of linear layers except the output head."""
    return sum(_linear_sizes(model))


def _linear_sizes(model: PreTrainedModel) -> list[int]:
    head = model.get_output_embeddings()
    return [m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def constants_bytes(num_weights: int, quantization: Quantization) -> int:
    """Return the bytes of the quantization constants of 4-bit weights: 0.5 bit a weight, or 0.127 when quantized too.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3 (double quantization).
    """
    blocks = math.ceil(num_weights / BLOCK)
    if not quantization.double_quantization:
        return blocks * _FLOAT32
    return blocks + math.ceil(blocks / OUTER_BLOCK) * _FLOAT32


def plan_base(settings: dict[str, Any], *, dtype: torch.dtype, device: str = "cpu") -> Memory:
    """Return what the untrained model takes to answer with: weights in `dtype`."""
    weights = num_parameters(skeleton_of(settings)) * dtype.itemsize
    return Memory(f"base, {_name(dtype)}", weights=weights, overhead=OVERHEAD_BYTES[device])


def plan_lora(settings: dict[str, Any], *, lora: Lora, work: Work, quantization: Quantization | None = None) -> Memory:
    """Return what LoRA takes, or QLoRA where there is a quantization.

    Raises:
        ConfigError: a target is no linear module, or the rank is larger than a layer.
    """
    model = skeleton_of(settings, dtype=work.dtype)
    linear, other = num_linear(model), num_parameters(model) - num_linear(model)
    build = _lora_builder(settings, lora, work.dtype)
    adapter = sum(p.numel() for p in build(model.config.num_hidden_layers).parameters() if p.requires_grad)
    activations = _activations(build, model, work)
    weights, constants, name = (linear + other) * work.dtype.itemsize, 0, f"LoRA r={lora.rank}, {_name(work.dtype)}"
    if quantization:
        weights, constants = linear // 2 + other * work.dtype.itemsize, constants_bytes(linear, quantization)
        activations += max(_linear_sizes(model)) * work.dtype.itemsize  # one layer at a time is dequantized
        name = f"QLoRA r={lora.rank}, {quantization.type.upper()}{' + DQ' if quantization.double_quantization else ''}"
    return Memory(
        name,
        weights=weights,
        constants=constants,
        adapter=adapter * _FLOAT32,
        gradients=adapter * _FLOAT32,
        optimizer=adapter * _ADAM_BYTES,
        activations=activations,
        logits=_cross_entropy_bytes(model, work),
        overhead=OVERHEAD_BYTES[work.device],
    )


def plan_distill(settings: dict[str, Any], student_settings: dict[str, Any], *, work: Work) -> Memory:
    """Return what distillation takes: a frozen teacher in `work.dtype`, a student trained whole in float32."""
    teacher, student = skeleton_of(settings), skeleton_of(student_settings)
    count = num_parameters(student)
    head = student.get_output_embeddings().weight.numel() * _FLOAT32
    cast = count * work.dtype.itemsize if work.dtype is not torch.float32 else 0
    return Memory(
        f"distillation, {student.config.num_hidden_layers} of {teacher.config.num_hidden_layers} layers",
        weights=count * _FLOAT32,
        teacher=num_parameters(teacher) * work.dtype.itemsize,
        gradients=count * _FLOAT32 + head,
        optimizer=count * _ADAM_BYTES,
        activations=_activations(lambda layers: skeleton_of(student_settings, num_layers=layers), student, work),
        logits=_divergence_bytes(student, work) + min(cast, 2 * head),
        overhead=OVERHEAD_BYTES[work.device],
    )


def _lora_builder(settings: dict[str, Any], lora: Lora, dtype: torch.dtype) -> Callable[[int], PeftModel]:
    def build(num_layers: int) -> PeftModel:
        model = skeleton_of(settings, num_layers=num_layers, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of peft's calls into transformers
            return add_lora(model, rank=lora.rank, alpha=lora.rank, dropout=0.0, targets=lora.targets)

    return build


def _activations(build: Callable[[int], nn.Module], model: PreTrainedModel, work: Work) -> int:
    return activation_bytes(
        build,
        num_layers=model.config.num_hidden_layers,
        batch_size=work.batch_size,
        length=work.length,
        dtype=work.dtype,
        checkpointing=work.checkpointing,
    )


def _cross_entropy_bytes(model: PreTrainedModel, work: Work) -> int:
    # 12 bytes a score: scores and gradient of the chunk before with the new scores and, of 16-bit ones, their float32 copy
    return 3 * _FLOAT32 * min(CHUNK_POSITIONS, work.positions) * model.config.vocab_size


def _divergence_bytes(model: PreTrainedModel, work: Work) -> int:
    # six float32 arrays of a chunk: both scores, both log-probabilities, the teacher's probabilities, a gradient
    return 6 * _FLOAT32 * min(CHUNK_POSITIONS, work.positions) * model.config.vocab_size


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
