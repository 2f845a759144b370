"""The frozen teacher as it is loaded for its targets: plain with its adapter merged, or quantized with its adapter beside."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_jobs.core.models import resolve_model
from ray_jobs.core.storage import local_folder
from ray_jobs.training.adapters import check_storage, load_named
from ray_jobs.training.models import Quantization, check_unquantized, load_model


def load_teacher(
    model: str, adapter: str | None = None, *, dtype: torch.dtype, quantization: Quantization | None = None, device: str = "cpu"
) -> nn.Module:
    """Return the teacher in eval mode, on its device.

    A quantized teacher keeps the adapter of `finetune` beside its weights, in its own precision: merged into 4-bit
    weights the sum would be rounded again, by steps larger than most of the update. Where finetune trained by QLoRA
    on the same storage this is, to the bit, the model that was trained.

    Args:
        model: as `resolve_model` takes it.
        adapter: PEFT folder or URI; none for a model that was trained whole.
        dtype: type of the weights that are not quantized, and of matrix products with those that are.
        quantization: how the linear layers are stored; none keeps them in `dtype`, with the adapter merged.

    Raises:
        ModelError: nothing usable under that name, or it is quantized already.
    """
    if quantization is None:
        return load_named(model, adapter, dtype=dtype, device=device)
    base: Any = load_model(resolve_model(model), dtype=dtype, quantization=quantization, device=device)
    if adapter is None:
        return base
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(local_folder(adapter))).eval()


def check_teacher(folder: Path, storage: str, *, dora: bool, device: str) -> None:
    """Refuse a storage that the teacher cannot have.

    Args:
        folder: the teacher's base.
        storage: none, nf4, fp4 or int8.
        dora: whether its adapter has magnitudes.

    Raises:
        ConfigError: DoRA on int8 weights on a CPU.
        ModelError: its weights are quantized already.
    """
    if storage != "none":
        check_unquantized(folder, what=f"distill.teacher_quantization = {storage}")
        check_storage(storage, dora=dora, device=device)
