"""The one place that loads encoders, and what of them a task uses.

Shapes: B rows, T positions, H width.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

from ray_jobs.core.errors import ModelError
from ray_jobs.distillation.encoders.texts import block_mask
from ray_jobs.training.batches import Batch

MODEL_CLASSES: dict[str, Any] = {
    "masked_language_model": AutoModelForMaskedLM,
    "embedding": AutoModel,
    "classification": AutoModelForSequenceClassification,
}
"""What loads the encoder of a task with its head."""
_TOLERANCE = 1e-3
"""Between hidden states of a text alone and of the same text among others; they are normalised to about 1."""


def load_encoder(folder: str | Path, task: str, *, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Return an encoder in eval mode with the head of its task.

    Args:
        folder: local Hugging Face folder with safetensors.
        task: masked_language_model, embedding or classification.
        dtype: of the weights.
        device: cpu, cuda or cuda:N.

    Raises:
        ModelError: it cannot be loaded, lacks the head's weights, or cannot keep packed texts apart.
    """
    try:
        model, info = MODEL_CLASSES[task].from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model folder {folder} cannot be loaded as an encoder: {error}") from None
    missing = sorted(name for name in info["missing_keys"] if task == "classification" or "pooler" not in name)
    if missing:
        raise ModelError(
            f'model folder {folder} has no weights for {missing[0]} ({len(missing)} tensors missing), which distill.task = "{task}" needs: '
            'set distill.task = "embedding"'
        )
    if info["missing_keys"]:
        model.base_model.pooler = None  # its weights are random, and the task does not use them
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
        raise ModelError(
            f"{type(model).__name__} has layers with a sliding window, which a row of packed texts would misplace: take a BERT-type encoder"
        )
    model = model.to(device).eval()
    check_packing(model)
    return model


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return an encoder's list of layers, and its name in the model.

    Raises:
        ModelError: there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise ModelError(f"no list of {model.config.num_hidden_layers} layers in {type(model).__name__}: take a BERT-type encoder")


def hidden_states(model: PreTrainedModel, batch: Batch, *, every_layer: bool = False) -> list[Tensor]:
    """Return an encoder's hidden states of shape B, T, H: the last alone, or the embeddings' and each layer's output."""
    body = model.base_model
    positions_BT = batch.position_ids_BT + _first_position(body)
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": positions_BT, "attention_mask": block_mask(batch.position_ids_BT)}
    found = body(**inputs, output_hidden_states=every_layer)
    return list(found.hidden_states) if every_layer else [found.last_hidden_state]


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse an encoder whose hidden states of a text change with the texts beside it in a row.

    Raises:
        ModelError: gives the difference.
    """
    device = next(model.parameters()).device
    ids = torch.arange(10, 22, device=device) % model.config.vocab_size
    together = torch.cat([torch.arange(5), torch.arange(7)]).to(device)
    try:
        packed_TH = hidden_states(model, Batch(ids[None], together[None], ids[None]))[0][0]
        # alone by the model's own positions and without a mask, as its users call it
        alone_TH = torch.cat([model.base_model(input_ids=part[None]).last_hidden_state[0] for part in (ids[:5], ids[5:])])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{type(model).__name__} does not take position ids with a mask of blocks: {error}") from None
    difference = float((packed_TH - alone_TH).float().abs().max())
    if difference > (_TOLERANCE if packed_TH.dtype is torch.float32 else 50 * _TOLERANCE):
        raise ModelError(
            f"{type(model).__name__} gives a text other hidden states in a packed row than alone (by up to {difference:.3g}): "
            "take a BERT, RoBERTa, DistilBERT or ELECTRA model"
        )


def _first_position(body: nn.Module) -> int:
    # RoBERTa and its kind count positions from behind the padding token's id
    padding = getattr(getattr(body, "embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1
