"""A causal language model's shapes without its weights, and what its weights take in each kind of storage."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ray_jobs.core.errors import ModelError
from ray_jobs.training.models import Quantization

BLOCK = 64
"""Weights that share one 4-bit quantization constant (bitsandbytes' default)."""
OUTER_BLOCK = 256
"""Constants that share one constant of their own under double quantization."""
_FLOAT32 = 4


class WeightBytes(NamedTuple):
    """Bytes of a frozen model."""

    weights: int
    constants: int = 0
    """What a reader of the weights needs beside them: the scales of quantized ones."""


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


def linear_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that quantized storage takes: linear ones except the output head."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]


def num_linear(model: PreTrainedModel) -> int:
    """Return the weights that quantized storage takes."""
    return sum(layer.weight.numel() for layer in linear_layers(model))


def weight_bytes(model: PreTrainedModel, *, dtype: torch.dtype, quantization: Quantization | None = None) -> WeightBytes:
    """Return what the weights take: linear layers as the quantization stores them, all others in `dtype`.

    Source:
        Dettmers et al. 2022, arXiv:2208.07339 (int8: one float32 scale a row); Dettmers et al. 2023, arXiv:2305.14314 (4 bits).
    """
    if quantization is None:
        return WeightBytes(num_parameters(model) * dtype.itemsize)
    linear = num_linear(model)
    others = (num_parameters(model) - linear) * dtype.itemsize
    if quantization.type == "int8":
        return WeightBytes(linear + others, sum(_num_outputs(layer) for layer in linear_layers(model)) * _FLOAT32)
    return WeightBytes(linear // 2 + others, constants_bytes(linear, quantization))


def _num_outputs(layer: nn.Module) -> int:
    return layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]


def constants_bytes(num_weights: int, quantization: Quantization) -> int:
    """Return the bytes of the quantization constants of 4-bit weights: 0.5 bit a weight, or 0.127 when quantized too.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3 (double quantization).
    """
    blocks = math.ceil(num_weights / BLOCK)
    if not quantization.double_quantization:
        return blocks * _FLOAT32
    return blocks + math.ceil(blocks / OUTER_BLOCK) * _FLOAT32
