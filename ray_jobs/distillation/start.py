"""The student before training: layers cut from the teacher's files, random weights in their shape, or a model of its own."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from ray_jobs.core.models import resolve_model
from ray_jobs.core.storage import local_folder
from ray_jobs.distillation.student import layers_prefix, shrink_config
from ray_jobs.training.adapters import load_merged
from ray_jobs.training.models import Quantization, load_model, skeleton
from ray_jobs.training.postponed import tensor_places

_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


class Start(NamedTuple):
    """Where the student's first weights come from; picklable."""

    model: str
    """Name, as `resolve_model` takes it: the student's own model, or the teacher's."""
    layers: tuple[int, ...] | None = None
    """Layers that are cut from it; none takes it whole."""
    adapter: str | None = None
    """Folder or URI of the teacher's adapter, merged into what is cut."""
    random_seed: int | None = None
    """Draws random weights of the shapes instead of cutting them."""


def load_start(start: Start, *, dtype: torch.dtype, quantization: Quantization | None = None, device: str = "cpu") -> PreTrainedModel:
    """Return the student before training: the same on every worker.

    Args:
        dtype: type of the weights that are not quantized.
        quantization: how the linear layers are stored; none keeps them in `dtype`.
    """
    if start.random_seed is not None:
        return _random(start, dtype).to(device)
    with start_folder(start, dtype=dtype) as folder:
        return load_model(folder, dtype=dtype, quantization=quantization, device=device)


@contextlib.contextmanager
def start_folder(start: Start, *, dtype: torch.dtype) -> Iterator[Path]:
    """Yield a plain model folder of the student before training; what had to be cut is gone after the block.

    Only the layers that stay are read, so that this takes the student's memory and not the teacher's.

    Args:
        dtype: type in which an adapter is merged.
    """
    folder = resolve_model(start.model)
    if start.layers is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        cut = Path(temporary) / "cut"
        cut_model(folder, start.layers, cut)
        if start.adapter is not None:
            adapter, merged = Path(temporary) / "adapter", Path(temporary) / "merged"
            cut_adapter(local_folder(start.adapter), start.layers, adapter, layer_name=_layer_name(folder))
            _write(load_merged(cut, adapter, dtype=dtype), merged)
            cut = merged
        yield cut


def cut_model(folder: Path, layers: tuple[int, ...], target: Path) -> None:
    """Write a model folder with some of another's layers, its embeddings, final norm, head and generation settings.

    Args:
        layers: indices in rising order, as `choose_layers` returns them.

    Raises:
        ModelError: the model has no list of layers.
    """
    target.mkdir()
    shrink_config(AutoConfig.from_pretrained(folder), list(layers)).save_pretrained(target)
    if (folder / GENERATION_CONFIG_NAME).exists():
        shutil.copy(folder / GENERATION_CONFIG_NAME, target)
    _cut_tensors(folder, layers, target / SAFE_WEIGHTS_NAME, layer_name=_layer_name(folder))


def _write(model: PreTrainedModel, target: Path) -> None:
    """Write a plain model folder, on whichever worker: `save_pretrained` of transformers 5 writes on worker 0 alone."""
    target.mkdir()
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    first_names: dict[int, str] = {}  # tied tensors are written once, under their first name
    kept = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if first_names.setdefault(tensor.data_ptr(), name) == name
    }
    save_file(kept, target / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def cut_adapter(folder: Path, layers: tuple[int, ...], target: Path, *, layer_name: re.Pattern[str]) -> None:
    """Write a PEFT adapter's folder for the layers that stay."""
    target.mkdir()
    shutil.copy(folder / _ADAPTER_CONFIG, target)
    _cut_tensors(folder, layers, target / _ADAPTER, layer_name=layer_name, source=_ADAPTER)


def _cut_tensors(
    folder: Path, layers: tuple[int, ...], target: Path, *, layer_name: re.Pattern[str], source: str = SAFE_WEIGHTS_NAME
) -> None:
    new_index = {old: new for new, old in enumerate(layers)}
    kept = {}
    for name, place in tensor_places(folder, source).items():
        found = layer_name.fullmatch(name)
        if found is None:
            kept[name] = place.read()
        elif int(found["index"]) in new_index:
            kept[f"{found['before']}{new_index[int(found['index'])]}{found['after']}"] = place.read()
    save_file(kept, target, metadata={"format": "pt"})


def _layer_name(folder: Path) -> re.Pattern[str]:
    """Return what matches the names of tensors of layers, with or without the wrappers' names before them."""
    model = skeleton(folder)
    inner = layers_prefix(model).removeprefix(f"{model.base_model_prefix}.")
    return re.compile(rf"(?P<before>(?:.*\.)?{re.escape(inner)})(?P<index>\d+)(?P<after>\..*)")


def _random(start: Start, dtype: torch.dtype) -> PreTrainedModel:
    folder = resolve_model(start.model)
    config = AutoConfig.from_pretrained(folder)
    small = config if start.layers is None else shrink_config(config, list(start.layers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start.random_seed or 0)
        model = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation="sdpa")
    if (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
