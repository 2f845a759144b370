"""Loading, adapters, 4-bit weights."""

import json
import shutil

import pytest
import torch

from ray_jobs.core.errors import ConfigError, ModelError
from ray_jobs.training.adapters import add_lora, check_lora, load_merged
from ray_jobs.training.batches import IGNORE, Batch
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import Quantization, choose_dtype, load_model, load_tokenizer, skeleton


@pytest.fixture
def tiny(tiny_model):
    return load_model(tiny_model, dtype=torch.float32)


def batch_of(num_tokens=24, rows=2, seed=0):
    ids = torch.randint(5, 49000, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = IGNORE
    return Batch(ids, torch.arange(num_tokens).repeat(rows, 1), labels)


def test_models_load_in_eval_mode_with_sdpa(tiny):
    assert not tiny.training
    assert tiny.config._attn_implementation == "sdpa"


def test_dtypes_by_name():
    assert choose_dtype("float16") is torch.float16
    assert choose_dtype("auto") in (torch.float32, torch.bfloat16, torch.float16)


def test_auto_is_bfloat16_only_where_the_cpu_has_it():
    flags = open("/proc/cpuinfo").read()
    assert (choose_dtype("auto") is torch.bfloat16) == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_auto_asks_the_device_given_and_not_the_machine(monkeypatch):
    on_cpu = choose_dtype("auto", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("auto", "cpu") is on_cpu is not torch.float16
    assert choose_dtype("auto", "cuda:0") is torch.float16


def test_adapters_are_float32_and_all_that_trains(tiny_model):
    model = add_lora(load_model(tiny_model, dtype=torch.bfloat16), rank=4, alpha=8, dropout=0.0, targets="all-linear")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype is torch.float32 for name, p in trained.items())
    hidden, inner, key_value = 64, 128, 32
    per_layer = 4 * (2 * (hidden + hidden) + 2 * (hidden + key_value) + 3 * (hidden + inner))
    assert sum(p.numel() for p in trained.values()) == 4 * per_layer


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "q_proj"])
def test_targets_by_name(tiny, targets):
    model = add_lora(tiny, rank=2, alpha=4, dropout=0.0, targets=targets)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == set([targets] if isinstance(targets, str) else targets)


@pytest.mark.parametrize("targets", [["q_proj", "wq"], "wq", [], ["embed_tokens"]])
def test_unknown_targets_are_refused_with_the_real_names(tiny_model, targets):
    with pytest.raises(ConfigError, match=r"finetune.lora.targets.*q_proj"):
        check_lora(skeleton(tiny_model), rank=2, targets=targets)


def test_a_rank_larger_than_a_layer_is_refused_with_the_largest_that_fits(tiny_model):
    with pytest.raises(ConfigError, match=r"finetune.lora.rank = 33 .*at most 32"):
        check_lora(skeleton(tiny_model), rank=33, targets="all-linear")
    check_lora(skeleton(tiny_model), rank=64, targets=["q_proj"])


def test_the_skeleton_has_no_weights(tiny_model):
    assert {p.device.type for p in skeleton(tiny_model).parameters()} == {"meta"}


def test_a_merged_adapter_gives_the_adapted_models_logits(tiny_model, tmp_path):
    model = add_lora(load_model(tiny_model, dtype=torch.float32), rank=4, alpha=8, dropout=0.0, targets="all-linear")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    model.save_pretrained(tmp_path)
    merged = load_merged(tiny_model, tmp_path, dtype=torch.float32)
    ids = batch_of().input_ids_BT
    with torch.no_grad():
        expected, plain = model.eval()(ids).logits, load_model(tiny_model, dtype=torch.float32)(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
        assert not torch.allclose(plain, expected, atol=1e-3)
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("type_", ["nf4", "fp4"])
def test_4_bit_gradients_equal_the_dequantized_models_after_an_evaluation(tiny_model, type_):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    quantized = load_model(tiny_model, dtype=torch.float32, quantization=Quantization(type_, True))
    plain = load_model(tiny_model, dtype=torch.float32)
    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                layers[name].weight.copy_(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    pair = []
    for model in (quantized, plain):
        torch.manual_seed(1)
        adapted = add_lora(model, rank=4, alpha=8, dropout=0.0, targets="all-linear")
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
        adapted.eval()
        with torch.no_grad():
            cross_entropy_loss(adapted, batch_of(seed=1))  # what makes bitsandbytes repack its weights
        adapted.train()
        cross_entropy_loss(adapted, batch_of()).total.backward()
        pair.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in pair[0].items():
        assert torch.allclose(gradient, pair[1][name], rtol=1e-3, atol=1e-4 * float(pair[1][name].abs().max())), name


def test_double_quantization_is_passed_on(tiny_model):
    import bitsandbytes as bnb

    nested = {}
    for double in (True, False):
        model = load_model(tiny_model, dtype=torch.float32, quantization=Quantization("nf4", double))
        layer = next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
        nested[double] = layer.weight.quant_state.nested
    assert nested == {True: True, False: False}


def test_a_quantized_folder_is_not_quantized_again(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    with pytest.raises(ModelError, match="quantized already"):
        load_model(folder, dtype=torch.float32, quantization=Quantization())


def test_models_that_change_logits_after_the_head_are_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        load_model(folder, dtype=torch.float32)


def test_a_head_with_a_bias_is_refused(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="head with a bias"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_broken_folder_is_one_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path, dtype=torch.float32)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
