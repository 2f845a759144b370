"""The student: chosen layers of the teacher with its embeddings, final norm and head; or a model with its vocabulary."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ray_jobs.core.errors import ModelError
from ray_jobs.distillation.layers import choose_layers


def build_student(teacher: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Return a new model of the teacher's architecture with copies of the chosen layers, in float32.

    Embeddings, final norm, output head and generation settings are the teacher's.

    Args:
        layers: indices in rising order, as `choose_layers` returns them.

    Raises:
        ModelError: the teacher has no list of decoder layers.
    """
    prefix = layers_prefix(teacher)
    student = AutoModelForCausalLM.from_config(shrink_config(teacher.config, layers), dtype=torch.float32, attn_implementation="sdpa")
    new_index = {f"{prefix}{old}.": f"{prefix}{new}." for new, old in enumerate(layers)}
    student.load_state_dict(_renamed(teacher.state_dict(), prefix, new_index))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def shrink_config(config: Any, layers: list[int]) -> Any:
    """Return a copy of a model's config for the chosen layers; settings that list one value a layer follow them."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = len(layers)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, [value[index] for index in layers])
    return small


def student_settings(config: Any, layers: int | list[int]) -> dict[str, Any]:
    """Return the config.json of a student with so many (or these) of a model's layers.

    Raises:
        ConfigError: layers that the model does not have.
    """
    return shrink_config(config, choose_layers(config.num_hidden_layers, layers)).to_dict()


def layers_prefix(model: PreTrainedModel) -> str:
    """Return how the names of a model's layers begin, such as "model.layers.".

    Raises:
        ModelError: the model has no list of layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return f"{name}."
    raise ModelError(
        f"no list of {model.config.num_hidden_layers} decoder layers in {type(model).__name__}: a student cannot be cut from it; "
        "name one with student.model"
    )


def _renamed(state: dict[str, torch.Tensor], prefix: str, new_index: dict[str, str]) -> dict[str, torch.Tensor]:
    kept = {}
    for name, tensor in state.items():
        layer = f"{prefix}{name[len(prefix) :].partition('.')[0]}."
        if not name.startswith(prefix):
            kept[name] = tensor
        elif layer in new_index:
            kept[new_index[layer] + name[len(layer) :]] = tensor
    return kept
