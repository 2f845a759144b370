"""Weights that stay in their files until someone asks: a strategy reads one part of a model, cuts it, and reads the next."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from ray_jobs.core.errors import ModelError

Read = Callable[[], Tensor]
_READ = "postponed_read"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Place(NamedTuple):
    """Where a tensor lies in a file of safetensors."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Return the tensor in memory of its own."""
        # safetensors' own reader maps the whole file as private memory, all of which the limit of a process counts
        tensor = torch.empty(self.shape, dtype=_DTYPES[self.dtype])
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            got = opened.readinto(tensor.view(-1).view(torch.uint8).numpy())
        if got < tensor.nbytes:
            raise ModelError(f"{self.file} ends {tensor.nbytes - got} bytes early: copy the model anew")
        return tensor


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
            parameter.data = getattr(parameter, _READ)().to(parameter.device, parameter.dtype)
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
        places = tensor_places(Path(folder))
    except FileNotFoundError as error:
        return f"it has no safetensors ({error})"
    reason = _mismatch(model, places, dtype)
    if reason:
        return reason
    _put_placeholders(model, places, dtype, torch.device(device))
    if (Path(folder) / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device)


def tensor_places(folder: Path, name: str = SAFE_WEIGHTS_NAME) -> dict[str, Place]:
    """Return where a model folder's tensors lie, by name.

    Raises:
        FileNotFoundError: it has no safetensors.
    """
    index = folder / f"{name}.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [name]
    return {tensor: place for file in files for tensor, place in _places_in(folder / file)}


def _places_in(file: Path) -> Iterator[tuple[str, Place]]:
    """Yield the tensors of a file: the length of its header in 8 bytes, the header, the tensors.

    Source:
        https://github.com/huggingface/safetensors, "Format".
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, Place(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])


def _mismatch(model: Any, places: dict[str, Place], dtype: torch.dtype) -> str:
    """Return why reading by name would not give what from_pretrained gives, which maps names and types; empty where it would."""
    parameters = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    for name, parameter in parameters.items():
        if name not in places or places[name].shape != parameter.shape:
            return f"its files have no {name} of shape {tuple(parameter.shape)}"
        if places[name].dtype not in _DTYPES:
            return f"its files have {name} in {places[name].dtype}"
    if tied & places.keys():
        return f"its files have {min(tied & places.keys())}, which its config ties to another"
    if dtype is not torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return "some of its modules stay in float32"
    return ""


def _put_placeholders(model: nn.Module, places: dict[str, Place], dtype: torch.dtype, device: torch.device) -> None:
    new = {}
    for name, old in model.named_parameters():
        # one number in place of all: on its device, with its shape, and settable by `.data`, none of which meta tensors allow
        new[id(old)] = nn.Parameter(torch.empty((), dtype=dtype, device=device).expand(old.shape))
        postpone(new[id(old)], places[name].read)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = new[id(parameter)]
