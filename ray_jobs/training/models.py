"""The one place that loads causal language models: plain, or with their linear layers in 4 or 8 bits."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ray_jobs.core.errors import ModelError
from ray_jobs.core.progress import say
from ray_jobs.training.postponed import postponed_model
from ray_jobs.training.ranks import rank

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AFTER_HEAD = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


class Quantization(NamedTuple):
    """How bitsandbytes stores the linear layers of a frozen base (Dettmers et al. 2023, arXiv:2305.14314)."""

    type: str = "nf4"
    """nf4 or fp4 (4 bits), or int8 (8 bits a weight, one scale an output row)."""
    double_quantization: bool = True
    """Whether the constants of 4-bit weights are quantized too."""


def choose_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """Return the computation type of a config's `dtype` on a device of this machine.

    Args:
        name: float32, bfloat16, float16, or auto: bfloat16 where the device computes in it (GPUs since Ampere,
            CPUs with AVX512-BF16 or AMX), else float16 on GPUs and float32 on CPUs.
        device: cpu, cuda or cuda:N: what the worker was given, not what the machine has.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Raises:
        ModelError: the folder has none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from None


def load_model(
    folder: str | Path, *, dtype: torch.dtype, quantization: Quantization | None = None, device: str = "cpu", postponed: bool = False
) -> PreTrainedModel:
    """Return a causal language model in eval mode with scaled-dot-product attention.

    Args:
        folder: local Hugging Face folder with safetensors.
        dtype: type of the weights that stay unquantized, and of matrix products with 4-bit ones.
        quantization: how the linear layers are stored; none keeps them in `dtype`.
        device: cpu, cuda or cuda:N.
        postponed: leave the weights in their files until a strategy reads them part by part (or `postponed.fill` all);
            a model that is stored otherwise than it is computed with is loaded whole all the same, and says why.

    Raises:
        ModelError: transformers cannot load it, it is quantized already, its head has a bias, or it changes its logits after it.
    """
    try:
        model = _load_postponed(folder, dtype, quantization, device) if postponed else None
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                quantization_config=_bitsandbytes(folder, quantization, dtype),
                device_map={"": device},
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model folder {folder} cannot be loaded: {error}") from None
    _refuse_logit_transforms(model.config, folder)
    _refuse_head_bias(model, folder)
    _keep_weights_unpacked(model)
    return model.eval()


def skeleton(folder: str | Path) -> PreTrainedModel:
    """Return the model of a folder's config on the meta device: its modules and shapes without weights."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the config in {folder} is no causal language model that transformers knows: {error}") from None


def check_unquantized(folder: str | Path, *, what: str) -> None:
    """Refuse a model folder whose weights are quantized already; reads its config alone.

    Args:
        what: what was to be done with it, such as "finetune.method = qlora".

    Raises:
        ModelError: it is quantized.
    """
    found = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if found:
        method = found.get("quant_method", "by an unknown method") if isinstance(found, dict) else found.quant_method
        raise ModelError(
            f"model folder {folder} is quantized already ({method}) and {what} needs plain weights: "
            "give the unquantized model, or use finetune.method = lora"
        )


def _load_postponed(folder: str | Path, dtype: torch.dtype, quantization: Quantization | None, device: str) -> PreTrainedModel | None:
    found = "quantizing needs whole weights" if quantization else postponed_model(folder, dtype=dtype, device=device)
    if not isinstance(found, str):
        return found
    if rank() == 0:
        say(f"each worker loads all of {folder} before it keeps its share: {found}")
    return None


def _bitsandbytes(folder: str | Path, quantization: Quantization | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    check_unquantized(folder, what=f"storing it in {quantization.type}")
    if quantization.type == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line a product on each cast of its input
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_weights_unpacked(model: nn.Module) -> None:
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first forward in eval mode for a
    # kernel without a backward pass: training after any evaluation then runs on wrong gradients, without an error.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _refuse_logit_transforms(config: Any, folder: str | Path) -> None:
    # losses.py projects hidden states with the head alone, so such a model would train on wrong logits in silence
    for name, neutral in _AFTER_HEAD.items():
        value = getattr(config, name, neutral)
        if value not in (None, neutral):
            raise ModelError(f"model folder {folder} sets {name} = {value}: models that change logits after the head are not supported")


def _refuse_head_bias(model: PreTrainedModel, folder: str | Path) -> None:
    # the divergence projects both models' hidden states with the weights alone
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"model folder {folder} has an output head with a bias: take a model whose head has none")
