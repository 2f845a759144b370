"""Weights that stay in their files until someone asks: a strategy reads one part of a model, cuts it, and reads the next."""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

Read = Callable[[], Tensor]
_READ = "postponed_read"


class _Place(NamedTuple):
    file: Path
    shape: tuple[int, ...]


def postpone(parameter: nn.Parameter, read: Read) -> None:
    """Let `fill` give a parameter what `read` returns then."""
    setattr(parameter, _READ, read)


def is_postponed(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has no values yet, but a shape, a type and a device."""
    return hasattr(parameter, _READ)


def fill(module: nn.Module) -> None:
    """Read the values that a module's parameters lack, one at a time, onto their devices."""
    for parameter in module.parameters():
        if is_postponed(parameter):
            parameter.data = getattr(parameter, _READ)().to(parameter.device, parameter.dtype, copy=True)
            delattr(parameter, _READ)


def cut_in_parts(parts: Iterable[nn.Module], cut: Callable[[nn.Module], Any]) -> None:
    """Read each part and cut it before the next is read, so that no more than one is whole at a time.

    Args:
        parts: may contain one another, the inner ones first.
        cut: leaves this worker with its share of a part.
    """
    for part in parts:
        fill(part)
        cut(part)


def postponed_model(folder: str | Path, *, dtype: torch.dtype, device: str) -> PreTrainedModel | str:
    """Return a folder's model with all weights postponed and its buffers real, or why its files cannot be read one by one."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        return "its weights are quantized"
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()  # the context unties them
    try:
        places = _places(Path(folder))
    except FileNotFoundError as error:
        return f"it has no safetensors ({error})"
    reason = _mismatch(model, places, dtype)
    if reason:
        return reason
    _put_placeholders(model, places, dtype, torch.device(device))
    if (Path(folder) / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device)


def _places(folder: Path) -> dict[str, _Place]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [SAFE_WEIGHTS_NAME]
    places = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            places |= {name: _Place(folder / file, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}
    return places


def _mismatch(model: Any, places: dict[str, _Place], dtype: torch.dtype) -> str:
    """Return why reading by name would not give what from_pretrained gives, which maps names and types; empty where it would."""
    parameters = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    for name, parameter in parameters.items():
        if name not in places or places[name].shape != parameter.shape:
            return f"its files have no {name} of shape {tuple(parameter.shape)}"
    if tied & places.keys():
        return f"its files have {min(tied & places.keys())}, which its config ties to another"
    if dtype is not torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return "some of its modules stay in float32"
    return ""


def _put_placeholders(model: nn.Module, places: dict[str, _Place], dtype: torch.dtype, device: torch.device) -> None:
    new = {}
    for name, old in model.named_parameters():
        # one number in place of all: on its device, with its shape, and settable by `.data`, none of which meta tensors allow
        new[id(old)] = nn.Parameter(torch.empty((), dtype=dtype, device=device).expand(old.shape))
        postpone(new[id(old)], functools.partial(_read, places[name].file, name))
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = new[id(parameter)]


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:  # opened for each, so that no more of the file stays mapped
        return opened.get_tensor(name)
