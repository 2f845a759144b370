"""A transformers causal language model to a stateful OpenVINO model, without optimum.

The graph is traced with an explicit key-value cache, each cache tensor becomes a state of the model that beam search
may reorder, and the result runs unmodified in OpenVINO GenAI, with or without paged attention.
Shapes: B sequences, T new positions, P cached positions, H key-value heads, D width of a head, V vocabulary.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

FIXED_INPUTS = ("input_ids", "attention_mask", "position_ids")
_TRACE_SHAPE = (2, 4, 3)  # B, T, P: all different from 1, so that no axis is taken for a constant


class _WithCacheTensors(nn.Module):
    """The model with its cache as plain tensors: (key of layer 0, value of layer 0, key of layer 1, ...)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the logits [B, T, V] and the grown cache tensors [B, H, P+T, D]."""
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            cache.layers.append(_filled_layer(keys, values))
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return (output.logits, *[tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)])


def _filled_layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    # cache.update() would start from a rank-1 empty tensor, whose concatenation OpenVINO cannot convert
    layer = DynamicLayer()
    layer.dtype, layer.device, layer.keys, layer.values, layer.is_initialized = keys.dtype, keys.device, keys, values, True
    return layer


def convert(model: PreTrainedModel) -> openvino.Model:
    """Return the stateful float32 OpenVINO model of a float32 torch model.

    Args:
        model: float32 causal language model in eval mode, on the CPU, with sdpa attention.
    """
    converted = _trace(model)
    past, present = _name_tensors(converted, num_layers=_text_config(model).num_hidden_layers)
    _let_beams_reorder(converted, past)
    _make_stateful(converted, dict(zip(past, present, strict=True)))
    converted.set_rt_info("PYTORCH", ["raystill", "source"])
    return converted


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _trace(model: PreTrainedModel) -> openvino.Model:
    config = _text_config(model)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, new, cached = _TRACE_SHAPE
    past = [torch.zeros(batch, num_kv_heads, cached, head_width) for _ in range(2 * config.num_hidden_layers)]
    example = {
        "input_ids": torch.ones(batch, new, dtype=torch.int64),
        "attention_mask": torch.ones(batch, cached + new, dtype=torch.int64),
        "position_ids": torch.arange(cached, cached + new).expand(batch, new),
        "past": past,
    }
    with torch.no_grad(), _without_telemetry(), warnings.catch_warnings():
        # the tracer warns of Python values that it keeps as constants; the parity check feeds other lengths
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        converted = openvino.convert_model(_WithCacheTensors(model), example_input=example)
    for tensor, port in zip([*list(example.values())[:3], *past], converted.inputs, strict=True):
        shape = [-1, -1] if tensor.ndim == 2 else [-1, num_kv_heads, -1, head_width]
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    converted.validate_nodes_and_infer_types()
    return converted


def _name_tensors(model: openvino.Model, *, num_layers: int) -> tuple[list[str], list[str]]:
    """Give inputs and outputs the names that OpenVINO GenAI looks for; return those of the cache, in and out."""
    kinds = [(layer, kind) for layer in range(num_layers) for kind in ("key", "value")]
    past = [f"past_key_values.{layer}.{kind}" for layer, kind in kinds]
    present = [f"present.{layer}.{kind}" for layer, kind in kinds]
    for port, name in zip(model.inputs, [*FIXED_INPUTS, *past], strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(model.outputs, ["logits", *present], strict=True):
        port.get_tensor().set_names({name})
    return past, present


def _let_beams_reorder(model: openvino.Model, past: list[str]) -> None:
    """Put Gather(cache, beam_idx) between each cache input and its readers."""
    beam_idx = ops.parameter([-1], dtype=np.int32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    for name in past:
        cache = model.input(name)
        readers = list(cache.get_target_inputs())
        gathered = ops.gather(cache.get_node(), beam_idx, ops.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
    model.add_parameters([beam_idx])
    model.validate_nodes_and_infer_types()


def _make_stateful(model: openvino.Model, states: dict[str, str]) -> None:
    """Turn each (past, present) pair into a state that starts empty with the batch size of input_ids."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    apply_make_stateful_transformation(model, states)
    ids_shape = ops.shape_of(model.input("input_ids").get_node(), output_type="i64")
    batch = ops.gather(ids_shape, ops.constant([0], dtype=np.int64), ops.constant(0, dtype=np.int64))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = node.get_output_partial_shape(0)
            tail = ops.constant([heads.get_length(), 0, width.get_length()], dtype=np.int64)
            empty = ops.broadcast(ops.constant(0.0, dtype=np.float32), ops.concat([batch, tail], axis=0))
            node.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def save(converted: openvino.Model, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write a folder that OpenVINO GenAI loads: graph, weights, tokenizer and detokenizer, configs, chat template."""
    from openvino_tokenizers import convert_tokenizer

    target.mkdir(parents=True, exist_ok=True)
    openvino.save_model(converted, target / "openvino_model.xml", compress_to_fp16=False)
    forward, backward = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(forward, target / "openvino_tokenizer.xml")
    openvino.save_model(backward, target / "openvino_detokenizer.xml")
    tokenizer.save_pretrained(target)
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)


def compress_weights(converted: openvino.Model) -> None:
    """Store all weights as asymmetric int8 per output channel, in place; products stay in the runtime's type."""
    with _without_telemetry():
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_ASYM)


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Keep openvino and nncf from reporting their use over the network; CI=true is the one switch that both know."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        os.environ.pop("CI")
        os.environ.update({} if before is None else {"CI": before})
