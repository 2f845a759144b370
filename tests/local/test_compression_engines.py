"""Every exporter and engine on a real model of small size: same logits, same greedy tokens, int8 small and close."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ray_jobs.compression.onnx_export import export_onnx
from ray_jobs.compression.parity import BOUNDS, relative_error
from ray_jobs.compression.runtimes import TorchRuntime
from ray_jobs.compression.torch_int8 import load_torch_int8
from ray_jobs.compression.variants import VARIANTS, Source, by_engine, export, open_variant
from ray_jobs.core.errors import ModelError

CI_BEFORE = os.environ.get("CI")
IDS = [11, 205, 3307, 41, 17000, 8, 999, 23, 500, 4242, 12, 77]
NEW_TOKENS = 12


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """Folder and facts of every variant of the tiny model."""
    kept, facts = tmp_path_factory.mktemp("variants"), {}
    source = Source(tiny_model, lambda: load(tiny_model), IDS)
    for engine, names in by_engine(list(VARIANTS)).items():
        for made in export(engine, names, source):
            made.folder.rename(kept / made.name)
            facts[made.name] = made.facts
    return kept, facts


@pytest.fixture(scope="module")
def plain(tiny_model):
    return TorchRuntime(load(tiny_model))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_says_what_the_model_says(name, exported, plain):
    folder, facts = exported
    runtime = open_variant(name, folder / name, num_threads=1)
    for ids in (IDS, IDS[:3], IDS * 5):  # a later, shorter text sees nothing of an earlier one
        error = relative_error(runtime.logits(ids), plain.logits(ids))
        assert error <= BOUNDS[VARIANTS[name].precision]
        assert error < 0.05
    assert facts[name]["relative_error"] < 0.05


@pytest.mark.parametrize("name", ["openvino-fp32", "onnx-fp32"])
def test_float_variants_generate_the_same_tokens(name, exported, plain):
    expected = plain.generate(IDS, NEW_TOKENS).token_ids
    assert open_variant(name, exported[0] / name, num_threads=1).generate(IDS, NEW_TOKENS).token_ids == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_generations_have_the_length_asked_for_and_are_timed(name, exported):
    runtime = open_variant(name, exported[0] / name, num_threads=1)
    for length in (2, NEW_TOKENS):
        generation = runtime.generate(IDS, length)
        assert len(generation.token_ids) == length
        assert 0 < generation.first_token_s < generation.total_s


def test_torch_generation_is_the_greedy_continuation(plain):
    generation = plain.generate(IDS, 4)
    ids = list(IDS)
    for token in generation.token_ids:
        logits = plain.logits(ids)[-1]
        logits[2] = -np.inf  # the end of text does not end a timed answer
        assert token == int(logits.argmax())
        ids.append(token)
    assert 0 < generation.first_token_s < generation.total_s


def test_int8_is_about_a_quarter(exported, tiny_model):
    weights = (tiny_model / "model.safetensors").stat().st_size
    assert (exported[0] / "torch-int8" / "model_int8.safetensors").stat().st_size < 0.35 * weights
    assert (exported[0] / "openvino-int8" / "openvino_model.bin").stat().st_size < 0.35 * weights


def test_saved_int8_model_is_the_one_that_was_checked(exported):
    model = load_torch_int8(exported[0] / "torch-int8")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    again = TorchRuntime(load_torch_int8(exported[0] / "torch-int8"))
    assert np.array_equal(TorchRuntime(model).logits(IDS), again.logits(IDS))


def test_openvino_folder_answers_text(exported, smollm2):
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(exported[0] / "openvino-int8"), "CPU")
    assert isinstance(pipeline.generate("What is a page table?", max_new_tokens=4), str)
    chat = [{"role": "user", "content": "What is a page table?"}]
    expected = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert pipeline.get_tokenizer().apply_chat_template(chat, add_generation_prompt=True) == expected


def test_nothing_is_reported_over_the_network(exported):
    from openvino_telemetry import Telemetry

    assert Telemetry().consent is False
    assert os.environ.get("CI") == CI_BEFORE


def save(model, tokenizer_from, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return folder


SHAPE = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=False)),
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=4, tie_word_embeddings=False, attention_bias=True)),
    ],
    ids=["qwen2-untied", "llama-bias"],
)
def test_other_shapes_export_with_parity(make, smollm2, tmp_path):
    torch.manual_seed(0)
    folder = save(make(), smollm2, tmp_path / "model")
    names = ["torch-int8", "openvino-fp32", "openvino-int8"]
    source = Source(folder, lambda: load(folder), IDS)
    made = {export_.name: export_.facts for engine, group in by_engine(names).items() for export_ in export(engine, group, source)}
    assert set(made) == set(names)


def test_an_export_that_drifts_is_refused(tiny_model):
    """Weights other than those of the folder: the builder reads the folder, the reference is the loaded model."""

    def load_other():
        model = load(tiny_model)
        model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
        return model

    with pytest.raises(ModelError, match=r"onnx-fp32 does not reproduce"):
        list(export("onnxruntime", ["onnx-fp32"], Source(tiny_model, load_other, IDS)))


def test_onnx_builder_failure_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"cannot export .*take the onnx variants out of compress\.variants"):
        export_onnx(Path(tmp_path / "nothing"), tmp_path / "out", precision="int8")
