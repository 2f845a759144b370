"""Adapters on bases of every storage: the gradients of the dequantized model, and merges that are the model that was trained."""

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ray_jobs.core.errors import ConfigError
from ray_jobs.training.adapters import add_lora, check_storage, load_merged, load_named
from ray_jobs.training.batches import IGNORE, Batch
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import Quantization, load_model

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"}
STORAGES = [Quantization("nf4", True), Quantization("nf4", False), Quantization("fp4", True), Quantization("int8")]


def batch_of(num_tokens=24, rows=2, seed=0):
    ids = torch.randint(5, 49000, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = IGNORE
    return Batch(ids, torch.arange(num_tokens).repeat(rows, 1), labels)


def adapted(model, **options):
    """The model with adapters that are not zero."""
    torch.manual_seed(1)
    model = add_lora(model, **LORA, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def dequantized(folder, quantization):
    """A plain model with the weights that a quantized one computes with, by bitsandbytes' own functions."""
    plain = load_model(folder, dtype=torch.float32)
    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in load_model(folder, dtype=torch.float32, quantization=quantization).named_modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                layers[name].weight.copy_(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
            elif isinstance(layer, bnb.nn.Linear8bitLt):
                layers[name].weight.copy_(bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB))
    return plain


def gradients_after_an_evaluation(model):
    model.eval()
    with torch.no_grad():
        cross_entropy_loss(model, batch_of(seed=1))  # what makes bitsandbytes repack 4-bit weights
    model.train()
    cross_entropy_loss(model, batch_of()).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits_in_training(model):
    # in eval mode int8 layers round their inputs too, which is no matter of the weights
    return model.train()(batch_of().input_ids_BT).logits


@pytest.mark.parametrize(("quantization", "dora"), [*((storage, False) for storage in STORAGES), (STORAGES[0], True)])
def test_gradients_on_a_quantized_base_equal_the_dequantized_models_after_an_evaluation(tiny_model, quantization, dora):
    stored = adapted(load_model(tiny_model, dtype=torch.float32, quantization=quantization), dora=dora)
    seen = gradients_after_an_evaluation(stored)
    expected = gradients_after_an_evaluation(adapted(dequantized(tiny_model, quantization), dora=dora))
    assert any("magnitude" in name for name in seen) == dora
    for name, gradient in seen.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max())), name


@pytest.mark.parametrize(
    ("quantization", "options"),
    [(None, {"dora": True}), (None, {"rslora": True}), (STORAGES[0], {}), (STORAGES[0], {"dora": True}), (STORAGES[3], {})],
)
def test_the_merged_model_is_the_one_that_was_trained(tiny_model, tmp_path, quantization, options):
    trained = adapted(load_model(tiny_model, dtype=torch.float32, quantization=quantization), **options)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.1)
    trained.save_pretrained(tmp_path)
    expected = logits_in_training(trained)
    merged = load_merged(tiny_model, tmp_path, dtype=torch.float32, quantization=quantization)
    assert {type(layer) for layer in merged.modules() if isinstance(layer, torch.nn.Linear)} == {torch.nn.Linear}
    assert getattr(merged.config, "quantization_config", None) is None
    torch.testing.assert_close(logits_in_training(merged), expected, rtol=1e-4, atol=1e-5)
    if quantization is not None:
        elsewhere = logits_in_training(load_merged(tiny_model, tmp_path, dtype=torch.float32))
        assert float((elsewhere - expected).abs().max()) > 1e-3


def test_rslora_scales_by_the_root_of_the_rank(tiny_model):
    scales = {}
    for rslora in (False, True):
        model = add_lora(load_model(tiny_model, dtype=torch.float32), **LORA, rslora=rslora)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        scales[rslora] = {layer.scaling["default"] for layer in layers}
    assert scales == {False: {8 / 4}, True: {8 / 2}}


def test_plain_peft_loads_what_was_saved(tiny_model, tmp_path):
    model = adapted(load_model(tiny_model, dtype=torch.float32))
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load_model(tiny_model, dtype=torch.float32), str(tmp_path))
    torch.testing.assert_close(logits_in_training(plain), logits_in_training(model))
    named = load_named(str(tiny_model), str(tmp_path), dtype=torch.float32)
    torch.testing.assert_close(logits_in_training(named), logits_in_training(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantization", STORAGES[1:])
def test_a_merge_in_16_bits_is_the_trained_model_to_their_precision(tiny_model, tmp_path, quantization):
    trained = adapted(load_model(tiny_model, dtype=torch.bfloat16, quantization=quantization))
    trained.save_pretrained(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_in_training(trained).float()
    merged, elsewhere = (load_merged(tiny_model, tmp_path, dtype=torch.bfloat16, quantization=q) for q in (quantization, None))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    error, other = (float((logits_in_training(model).float() - expected).norm() / expected.norm()) for model in (merged, elsewhere))
    assert error < 0.02
    assert other > 1.5 * error or quantization.type == "int8"  # whose own rounding is as small as that of 16 bits


def test_dora_on_int8_is_refused_on_a_cpu_with_a_way_out():
    with pytest.raises(ConfigError, match=r'finetune.lora.dora = true .*"int8" on a CPU .*use type = "nf4"'):
        check_storage("int8", dora=True, device="cpu")
    check_storage("int8", dora=True, device="cuda")
    check_storage("int8", dora=False, device="cpu")
    check_storage("nf4", dora=True, device="cpu")
