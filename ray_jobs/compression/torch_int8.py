"""Symmetric int8 in plain torch: weights with one scale per output row, activations with one per token.

`torch.ao` dynamic quantization gives all tokens of a call one activation scale; language models have tokens whose
activations dwarf the others, which then round to nothing: on SmolLM2-135M its KL to the float model is 1.1 nats a token,
against 0.04 with a scale for each token.
Shapes: N tokens, I input width, O output width, V vocabulary, H width of an embedding.
"""

from pathlib import Path

import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

LARGEST = 127
WEIGHTS = "model_int8.safetensors"  # not model.safetensors: transformers alone could not load it


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values and float32 scales with `values ~ int8 * scale`, one scale per row.

    Args:
        values: float [rows, width].

    Source:
        Symmetric absmax quantization, as in the vector-wise scheme of Dettmers et al. 2022, arXiv:2208.07339, section 2.
    """
    scales = values.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (values / scales).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear layer with an int8 product: x W^T in int32, then both scales.

    Args:
        in_features: input width I.
        out_features: output width O.
        has_bias: whether a float32 bias is added.
    """

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, 1))
        self.register_buffer("bias", torch.empty(out_features) if has_bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., O] of a float32 [..., I]."""
        x_NI, x_scales_N1 = quantize_rows(x.reshape(-1, x.shape[-1]))
        y_NO = torch._int_mm(x_NI, self.weight.t()).float() * x_scales_N1 * self.scales.t()
        return (y_NO if self.bias is None else y_NO + self.bias).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """An embedding table in int8 rows; shares its tensors with the head where the model ties them.

    Args:
        num_embeddings: rows V.
        width: width H.
    """

    def __init__(self, num_embeddings: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(num_embeddings, width, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(num_embeddings, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., H] of token ids [...]."""
        return self.weight[ids] * self.scales[ids]


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the linear layers and the token embedding by int8 ones, in place, and return the model.

    Args:
        model: float32 causal language model in eval mode.
    """
    sources = {name: layer for name, layer in model.named_modules() if _replaceable(model, layer)}
    _replace(model)
    for name, layer in sources.items():
        place = model.get_submodule(name)
        place.weight, place.scales = quantize_rows(layer.weight.detach())
        if getattr(layer, "bias", None) is not None:
            place.bias = layer.bias.detach().float()
    _tie(model)
    return model


def export_torch_int8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> PreTrainedModel:
    """Quantize a model in place, write it with its tokenizer to `target`, and return it."""
    target.mkdir(parents=True, exist_ok=True)
    quantize(model)
    save_tensors(model, str(target / WEIGHTS))
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return model


def load_torch_int8(folder: Path) -> PreTrainedModel:
    """Return the model of an exported folder, on the CPU, in eval mode."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="sdpa")
    model.generation_config = GenerationConfig.from_pretrained(folder)
    _replace(model)
    _tie(model)
    load_tensors(model, str(folder / WEIGHTS))
    return model.eval()


def _replaceable(model: PreTrainedModel, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or layer is model.get_input_embeddings()


def _replace(model: PreTrainedModel) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, Int8Linear(layer.in_features, layer.out_features, has_bias=layer.bias is not None))
        elif layer is model.get_input_embeddings():
            model.set_submodule(name, Int8Embedding(layer.num_embeddings, layer.embedding_dim))


def _tie(model: PreTrainedModel) -> None:
    if model.config.tie_word_embeddings:
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        head.weight, head.scales = table.weight, table.scales
