"""The heads of encoders on chosen positions only: masked tokens as a projection to the vocabulary, classes as logits.

Shapes: N positions, S texts, H width, V vocabulary, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import gelu

from ray_jobs.core.errors import ModelError


def token_head(model: PreTrainedModel) -> Tensor:
    """Return the output embedding of a masked-token head with its bias as a last column: shape V, H + 1."""
    decoder = model.get_output_embeddings()
    bias = decoder.bias if decoder.bias is not None else decoder.weight.new_zeros(len(decoder.weight))
    return torch.cat([decoder.weight, bias[:, None]], dim=1)


def token_states(model: PreTrainedModel, hidden_NH: Tensor) -> Tensor:
    """Return what the output embedding projects, with a last column of ones for its bias: shape N, H + 1.

    Raises:
        ModelError: the layers before the projection are not known.
    """
    states_NH = _transform(model, hidden_NH)
    return torch.cat([states_NH, states_NH.new_ones(len(states_NH), 1)], dim=1)


def class_logits(model: PreTrainedModel, first_SH: Tensor) -> Tensor:
    """Return the class logits of texts from the hidden states of their first tokens: shape S, C.

    Raises:
        ModelError: the classifier is not known.
    """
    body: Any = model.base_model
    first_S1H = first_SH[:, None]
    if getattr(body, "pooler", None) is not None:  # BERT
        return model.classifier(model.dropout(body.pooler(first_S1H)))
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return model.classifier(model.dropout(torch.relu(model.pre_classifier(first_SH))))
    if hasattr(model.classifier, "out_proj"):  # RoBERTa, ELECTRA
        return model.classifier(first_S1H)
    raise ModelError(f"the classifier of {type(model).__name__} is not known: take a BERT, DistilBERT, RoBERTa or ELECTRA model")


def _transform(model: PreTrainedModel, hidden_NH: Tensor) -> Tensor:
    inner: dict[str, nn.Module] = dict(model.named_children())
    if "cls" in inner:  # BERT
        return model.cls.predictions.transform(hidden_NH)
    if "vocab_transform" in inner:  # DistilBERT
        return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_NH)))
    if "lm_head" in inner and hasattr(model.lm_head, "layer_norm"):  # RoBERTa
        return model.lm_head.layer_norm(gelu(model.lm_head.dense(hidden_NH)))
    raise ModelError(f"the masked-token head of {type(model).__name__} is not known: take a BERT, DistilBERT or RoBERTa model")
