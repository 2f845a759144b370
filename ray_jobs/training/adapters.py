"""Low-rank adapters: new ones on a model, what a model cannot hold, and saved ones added into the weights they were trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import resolve_model
from ray_jobs.core.storage import local_folder
from ray_jobs.training.models import Quantization, load_model

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    rslora: bool = False,
    dora: bool = False,
) -> "PeftModel":
    """Return the model with new trainable low-rank adapters (float32) on its frozen linear layers.

    Args:
        alpha: the update is scaled by alpha / rank.
        targets: "all-linear", or names of linear modules such as ["q_proj", "v_proj"].
        rslora: scale the update by alpha / sqrt(rank) instead.
        dora: train a magnitude of each output beside the direction.

    Raises:
        ConfigError: a target is no linear module of the model, or the rank is larger than a layer.

    Source:
        Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Liu et al. 2024, arXiv:2402.09353.
    """
    from peft import LoraConfig, get_peft_model  # with bitsandbytes behind it 50 MiB, which training without adapters does without

    check_lora(model, rank=rank, targets=targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if targets == ALL_LINEAR else sorted(_names(targets)),
        use_rslora=rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load_merged(
    base_folder: str | Path,
    adapter_folder: str | Path,
    *,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Return a base with a saved adapter added into its weights: a plain model in eval mode.

    Args:
        dtype: type of the weights.
        quantization: the weights are first rounded as this storage rounds them, which makes it the model that an
            adapter was trained on under QLoRA; none takes them as they are.
    """
    from peft import PeftModel

    base: Any = load_model(base_folder, dtype=dtype, quantization=quantization, device=device)
    if quantization is not None:
        base = base.dequantize(dtype)  # PEFT would merge into 4-bit layers by quantizing the sum again
    merged: Any = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    return merged.eval()


def load_named(model: str, adapter: str | None = None, *, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Return a model by its name, as `resolve_model` takes it, with the adapter of a folder or URI added where there is one.

    Raises:
        ModelError: nothing usable under that name.
    """
    folder = resolve_model(model)
    if adapter is None:
        return load_model(folder, dtype=dtype, device=device)
    return load_merged(folder, local_folder(adapter), dtype=dtype, device=device)


def check_lora(model: nn.Module, *, rank: int, targets: str | list[str], section: str = "finetune") -> None:
    """Refuse adapters that the model cannot hold.

    Args:
        model: the model or its skeleton.
        section: of the config, for the message.

    Raises:
        ConfigError: a target is no linear module of the model, or the rank is larger than a layer.
    """
    layers = _linear_layers(model)
    wanted = _wanted_names(targets, sorted({name.rpartition(".")[2] for name in layers}), section)
    for name, layer in layers.items():
        smallest = min(layer.in_features, layer.out_features)
        if rank > smallest and (wanted is None or name.rpartition(".")[2] in wanted):
            raise ConfigError(
                f"{section}.lora.rank = {rank} is larger than layer {name} ({layer.in_features} x {layer.out_features}): "
                f"choose at most {smallest}"
            )


def check_storage(type_: str, *, dora: bool, device: str, section: str = "finetune") -> None:
    """Refuse adapters that cannot be trained on a base stored in so many bits on such a device.

    Args:
        type_: nf4, fp4 or int8.
        section: of the config, for the message.

    Raises:
        ConfigError: DoRA on int8 weights on a CPU.
    """
    if type_ == "int8" and dora and device == "cpu":
        # PEFT 0.21 puts a copied weight back after reading it on a CPU, and bitsandbytes 0.50 loses its scales with the copy
        raise ConfigError(
            f'{section}.lora.dora = true cannot be trained on {section}.quantization.type = "int8" on a CPU (the second forward fails '
            'inside bitsandbytes): use type = "nf4", a worker with a GPU, or dora = false'
        )


def _wanted_names(targets: str | list[str], known: list[str], section: str) -> set[str] | None:
    if targets == ALL_LINEAR:
        return None
    names = _names(targets)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"{section}.lora.targets = {targets!r}: {unknown[:1] or 'an empty list'} names no linear module of this model; "
            f'use "all-linear" or some of {known}'
        )
    return set(names)


def _names(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
