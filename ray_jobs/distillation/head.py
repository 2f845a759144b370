"""The teacher's output embedding alone: all that a student needs of a teacher whose hidden states are kept or come from elsewhere.

Shapes: H width, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_jobs.training.losses import causal_lm
from ray_jobs.training.models import skeleton
from ray_jobs.training.postponed import tensor_places

_ADAPTER = "adapter_model.safetensors"


def read_head(folder: Path, adapter: Path | None, *, dtype: torch.dtype, device: str, load: Callable[[], nn.Module]) -> Tensor:
    """Return head_VH of a model folder, frozen.

    Args:
        folder: local Hugging Face folder.
        adapter: PEFT folder that is merged into the model.
        dtype: as the model is loaded in.
        load: returns the whole model; called where the head cannot be read alone: an adapter changes it, or its files name it otherwise.
    """
    name = _name_of_head(folder, adapter)
    if name is None:
        return causal_lm(load()).get_output_embeddings().weight.detach().clone()
    return tensor_places(folder)[name].read().to(device, dtype)


def _name_of_head(folder: Path, adapter: Path | None) -> str | None:
    """Return the name of the head in a folder's files, where it is there and no adapter changes it."""
    model = skeleton(folder)
    head = model.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    tied = [model.get_input_embeddings()] if model.config.get_text_config().tie_word_embeddings else []
    wanted = [names[id(module)] for module in (head, *tied)]
    changed = tensor_places(adapter, _ADAPTER) if adapter else {}
    if any(name.removesuffix(".weight").rpartition(".")[2] in key.split(".") for name in wanted for key in changed):
        return None
    shape = tuple(head.weight.shape)
    return next((name for name in wanted if name in (places := tensor_places(folder)) and places[name].shape == shape), None)
