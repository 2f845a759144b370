"""The memory plan: figures that are known of well-known models, and the table that `raystill plan` prints."""

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, Qwen3Config

from ray_jobs import plan
from ray_jobs.core.config_file import load_config
from ray_jobs.core.errors import ConfigError, ModelError
from ray_jobs.training.activations import activation_bytes
from ray_jobs.training.architecture import find_architecture
from ray_jobs.training.losses import CHUNK_POSITIONS, head_cross_entropy
from ray_jobs.training.memory_plan import (
    Lora,
    Work,
    constants_bytes,
    num_linear,
    num_parameters,
    plan_base,
    plan_distill,
    plan_lora,
    skeleton_of,
)
from ray_jobs.training.models import Quantization, load_model

CONFIGS = Path(__file__).parents[2] / "ray_jobs" / "configs"
LLAMA_2, LLAMA_3 = (find_architecture(name).settings for name in ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B"))
SMALL = LLAMA_2 | {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
WORK = Work(batch_size=1, length=64, dtype=torch.float16, checkpointing=True, device="cuda")


@pytest.mark.parametrize(
    ("settings", "dtype", "gigabytes"),
    [(LLAMA_2, torch.float32, 26.95), (LLAMA_2, torch.float16, 13.48), (LLAMA_3, torch.float32, 32.12)],
)
def test_weights_of_known_models(settings, dtype, gigabytes):
    assert plan_base(settings, dtype=dtype).weights / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_nf4_of_llama_3_with_16_bit_embeddings_and_head():
    model = skeleton_of(LLAMA_3)
    linear = num_linear(model)
    assert (linear / 2 + 2 * (num_parameters(model) - linear)) / 1e9 == pytest.approx(5.59, abs=0.005)
    assert constants_bytes(linear, Quantization(double_quantization=True)) / 1e9 == pytest.approx(0.11, abs=0.005)


@pytest.mark.parametrize(("double", "bits"), [(False, 0.5), (True, 0.127)])
def test_quantization_constants_in_bits_a_weight(double, bits):
    assert constants_bytes(10**9, Quantization(double_quantization=double)) * 8 / 10**9 == pytest.approx(bits, abs=5e-4)


def test_plan_of_qlora_on_llama_3_as_a_whole():
    memory = plan_lora(LLAMA_3, lora=Lora(32, ["q_proj", "k_proj", "v_proj", "o_proj"]), work=WORK, quantization=Quantization())
    assert memory.weights / 1e9 == pytest.approx(5.59, abs=0.005)
    assert memory.adapter / 1e6 == pytest.approx(109.1, abs=0.05)
    assert (memory.gradients, memory.optimizer) == (memory.adapter, 2 * memory.adapter)
    assert memory.total == sum(memory[1:])


def test_constants_equal_what_bitsandbytes_keeps(tmp_path):
    settings = SMALL | {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    real = skeleton_of(settings).to_empty(device="cpu")
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    real.save_pretrained(tmp_path)
    for double in (False, True):
        kept = stored = 0
        model = load_model(tmp_path, dtype=torch.float32, quantization=Quantization(double_quantization=double))
        for weight in (p for p in model.parameters() if hasattr(p, "quant_state")):
            stored += weight.numel() * weight.element_size()
            state = weight.quant_state
            kept += state.absmax.numel() * state.absmax.element_size() + (state.state2.absmax.numel() * 4 if double else 0)
        linear = num_linear(skeleton_of(settings))
        assert stored == linear // 2
        assert kept == pytest.approx(constants_bytes(linear, Quantization(double_quantization=double)), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_equal_what_autograd_saves_on_real_tensors(dtype):
    settings = SMALL | {"num_hidden_layers": 5}
    model = skeleton_of(settings).to_empty(device="cpu").train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids, mask = torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()
    precision = torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), precision:
        model.get_decoder()(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    options = {"num_layers": 5, "batch_size": 2, "length": 16, "dtype": dtype, "checkpointing": False}
    counted = activation_bytes(lambda layers: skeleton_of(settings, num_layers=layers), **options)
    assert counted == pytest.approx(sum(size for size, _ in saved.values()), rel=0.02)


def test_checkpointing_length_and_batch_move_activations_as_they_should():
    def activations(batch_size=1, length=64, checkpointing=False):
        work = Work(batch_size, length, torch.float16, checkpointing)
        return plan_lora(SMALL | {"num_hidden_layers": 24}, lora=Lora(2), work=work).activations

    assert activations(checkpointing=True) < activations() / 5
    assert activations(batch_size=4) == pytest.approx(4 * activations(), rel=0.15)
    assert activations(length=256) > 4 * activations(length=64) * 0.85


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_planned_are_what_the_loss_allocates(dtype):
    settings = SMALL | {"vocab_size": 4096, "num_hidden_layers": 1}
    work = Work(batch_size=4, length=CHUNK_POSITIONS, dtype=dtype, checkpointing=False)
    planned = plan_lora(settings, lora=Lora(2), work=work).logits
    hidden = torch.randn(work.positions, 8, dtype=dtype, requires_grad=True)
    head, labels = torch.randn(4096, 8, dtype=dtype), torch.zeros(work.positions, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        head_cross_entropy(hidden, head, None, labels)
    found = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))
    assert max(alive) == pytest.approx(planned, rel=0.05)


def test_a_gpu_worker_is_held_to_the_gpus_memory(tiny_config):
    cramped = plan.run(tiny_config(workers__gpus=1, workers__memory="900GiB", workers__gpu_memory="1MiB"), force=False)
    assert cramped["limit_bytes"] == 2**20
    assert "raise [workers] gpu_memory" in "\n".join(cramped["headline"])
    roomy = plan.run(tiny_config(workers__gpus=0, workers__memory="900GiB", workers__gpu_memory="1MiB"), force=False)
    assert roomy["limit_bytes"] == 900 * 2**30


def test_distillation_counts_teacher_and_student_apart():
    memory = plan_distill(LLAMA_2, LLAMA_2 | {"num_hidden_layers": 16}, work=WORK)
    student = num_parameters(skeleton_of(LLAMA_2, num_layers=16))
    assert memory.teacher / 1e9 == pytest.approx(13.48, abs=0.005)
    assert memory.weights == 4 * student
    assert memory.optimizer == 8 * student


def test_families_with_other_fields_are_planned(tiny_config, tmp_path):
    gpt2 = GPT2Config(vocab_size=97, n_embd=32, n_head=2, n_layer=4)
    qwen = {k: v for k, v in SMALL.items() if k != "model_type"} | {"num_hidden_layers": 4, "head_dim": 8}
    for number, config in enumerate([gpt2, Qwen3Config(**qwen, layer_types=["sliding_attention", "full_attention"] * 2)]):
        config.save_pretrained(tmp_path / str(number))
        rows = plan.run(tiny_config(teacher__model=str(tmp_path / str(number)), finetune__lora={"rank": 2}), force=False)["rows"]
        assert rows[-1]["method"] == "distillation, 2 of 4 layers"
        assert rows[-1]["activations"] > 0


def test_table_agrees_with_the_converted_built_in_model(smollm2):
    built_in, converted = (num_parameters(skeleton_of(s)) for s in (find_architecture("smollm2-135m-instruct").settings, _config(smollm2)))
    assert built_in == converted == 134515008


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def test_unknown_model_is_one_line():
    with pytest.raises(ModelError, match=r"no/such-model.*meta-llama/Llama-2-7b-hf") as caught:
        find_architecture("no/such-model")
    assert "\n" not in str(caught.value)


def test_folder_without_a_config_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        find_architecture(str(tmp_path))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("llama*.toml")))
def test_ready_runs_plan_and_their_finetuning_fits(name):
    summary = plan.run(load_config(CONFIGS / f"{name}.toml"), force=False)
    rows = {row["method"]: row for row in summary["rows"]}
    assert rows[summary["configured"]]["fits"]
    assert summary["configured"].startswith("QLoRA")
    assert not rows["base, float32"]["fits"]
    assert rows[summary["configured"]]["total"] < 10e9
    text = "\n".join(summary["headline"])
    assert "built-in table" in text
    assert "first that fits" in text


def test_what_does_not_fit_says_so_and_names_what_does(tiny_config):
    roomy = plan.run(tiny_config(), force=False)
    totals = {row["method"]: row["total"] for row in roomy["rows"] if row["job"] == "finetune"}
    assert list(totals.values()) == sorted(totals.values(), reverse=True)
    lora, nf4, _ = totals.values()
    tight = plan.run(tiny_config(workers__memory=f"{(lora + nf4) // 2}B"), force=False)
    assert tight["first_that_fits"] == list(totals)[1]
    assert any("does not fit; first that fits: QLoRA" in line for line in tight["headline"])
    none = plan.run(tiny_config(workers__memory="1MiB"), force=False)
    assert none["first_that_fits"] is None
    assert any("no method fits: raise [workers] memory" in line for line in none["headline"])


def test_bad_students_and_adapters_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"student\.layers = 9"):
        plan.run(tiny_config(student__layers=9), force=False)
    with pytest.raises(ConfigError, match="names no linear module"):
        plan.run(tiny_config(finetune__lora={"targets": ["q_porj"]}), force=False)


def test_plan_is_a_command_without_ray_that_writes_nothing(tmp_path):
    config = tmp_path / "plan.toml"
    config.write_text(f'run = {{ name = "x", storage = "{tmp_path / "runs"}" }}\nstudent.layers = 15\nworkers.memory = "4GiB"\n')
    main = f"import sys; from ray_jobs.__main__ import main; code = main(['plan', {str(config)!r}, '--json'])"
    script = f"{main}; sys.exit(code or 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["limit_bytes"] == 4 * 2**30
    assert not (tmp_path / "runs").exists()
