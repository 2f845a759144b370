"""distill on a real cluster: a plain student folder, numbers that point the right way, refusals before anything starts."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ray_jobs import distill, prepare
from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigError, StageMissing
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.distillation.influence import most_influential

LOAD = """
import sys
sys.modules["ray_jobs"] = sys.modules["ray"] = sys.modules["peft"] = None  # importing them fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
asked = [{"role": "user", "content": "hello"}]
chat = tokenizer.apply_chat_template(asked, return_tensors="pt", add_generation_prompt=True, return_dict=True)
assert model.generate(**chat, max_new_tokens=2).shape[1] > chat["input_ids"].shape[1]
print(model.config.num_hidden_layers, "layers")
"""

pytestmark = pytest.mark.cluster


def assert_plain(folder):
    """Fail where the folder needs raystill to be loaded, or tells of this machine."""
    told = [path.name for path in folder.iterdir() if path.suffix != ".safetensors" and str(folder.parents[2]) in path.read_text()]
    assert not told
    loaded = subprocess.run([sys.executable, "-I", "-c", LOAD, str(folder)], cwd=folder, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "2 layers"


def test_the_student_learns_is_plain_and_is_not_trained_again(finetuned, tiny_config):
    config = finetuned(distill__max_steps=30, distill__learning_rate=3e-3, distill__kd_weight=1.0, distill__ce_weight=0.0)
    manifest = distill.run(config, force=False)
    losses = manifest["eval"]
    assert losses["kl_after_nats"] < 0.8 * losses["kl_before_nats"]
    taught = RunFolder(config).finished("finetune")["eval"]["teacher_nats"]
    assert losses["ce_teacher_nats"] == pytest.approx(taught, rel=1e-2), "the teacher is the base with the adapter of finetune"
    assert manifest["num_parameters"]["student"] < manifest["num_parameters"]["teacher"]
    stage = RunFolder(config).folder("distill")
    assert {"student", "metrics.jsonl", "manifest.json"} <= set(stage.names())
    assert not {"initial", "checkpoints"} & set(stage.names())
    student, tokenizer = (auto.from_pretrained(stage.local("student")) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert student.config.num_hidden_layers == 2
    assert tokenizer.chat_template
    assert student(torch.arange(8)[None]).logits.shape == (1, 8, 49152)
    assert_plain(stage.local("student"))
    card = (stage.local("student") / "README.md").read_text()
    assert str(stage.uri) not in card
    assert f"| {losses['kl_before_nats']:.4g} | {losses['kl_after_nats']:.4g} | 0 |" in card
    assert distill.run(config, force=False)["id"] == manifest["id"]
    steps = [line["step"] for line in stage.read_jsonl("metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 31))


def test_a_student_of_its_own_needs_the_teachers_vocabulary(finetuned, tiny_config, tiny_model, tmp_path):
    with pytest.raises(StageMissing, match="prepare"):
        distill.run(tiny_config(), force=False)
    finetuned()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<another>"])
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(other)
    tokenizer.save_pretrained(other)
    config = tiny_config(student__layers=9)
    with pytest.raises(ConfigError, match=r"student\.layers = 9, but the teacher has 4"):
        distill.run(config, force=False)
    with pytest.raises(ConfigError, match="token '<another>' has id 49152 in the student and None in the teacher"):
        distill.run(tiny_config(student__model=str(other)), force=False)
    assert not RunFolder(config).folder("distill").exists("started.json")
    manifest = distill.run(tiny_config(student__model=str(tiny_model), distill__max_steps=2), force=False)
    assert manifest["num_parameters"]["student"] == manifest["num_parameters"]["teacher"]
    assert 0 < manifest["eval"]["kl_before_nats"] < 1
    adapted = {"distill__method": "qlora", "distill__teacher_quantization": "nf4", "distill__max_steps": 12, "distill__learning_rate": 1e-2}
    config = tiny_config(student__choose="influence", **adapted)
    manifest = distill.run(config, force=True)
    assert manifest["eval"]["ce_after_nats"] < manifest["eval"]["ce_before_nats"] - 0.1
    stage = RunFolder(config).folder("distill")
    found = stage.read_json("influence.json")
    assert manifest["layers"] == most_influential(found["influence"], 2)
    assert found["positions"] > found["rows"] > 0
    written = AutoModelForCausalLM.from_pretrained(stage.local("student"))
    assert written.config.num_hidden_layers == 2
    assert not hasattr(written.config, "quantization_config")
    assert "quantized base, merged" in (stage.local("student") / "README.md").read_text()
    stage.write_json("influence.json", {**found, "influence": [1, 0, 0, 1]})
    stage.delete("manifest.json")
    assert distill.run(config, force=False)["layers"] == [0, 3], "a job that goes on reads what was measured"


def test_two_teachers_teach_a_source_each_in_workers_and_from_pools(finetuned, tiny_model, tmp_path):
    torch.manual_seed(1)
    shape = AutoConfig.from_pretrained(tiny_model)
    shape.hidden_size, shape.num_hidden_layers, shape.head_dim = 32, 2, 8
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "narrow")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "narrow")
    second = {"model": str(tmp_path / "narrow"), "sources": ["pairs.jsonl"], "weight": 3.0}
    shared = {"distill__teachers": {"second": second}, "distill__teacher_sources": ["*.md"], "distill__ce_weight": 0.0}
    shared |= {"distill__max_steps": 12, "distill__learning_rate": 3e-3, "data__max_length": 256}
    config = finetuned(**shared, workers__num_workers=2, distill__cache={"folder": str(tmp_path / "cache"), "dtype": "float32"})
    with pytest.raises(ConfigError, match=r"\[distill\.teachers\.second\] sources: 'law' names no source .*notes\.md', '.*pairs\.jsonl'"):
        prepare.check(replaced(config, second | {"sources": ["law"]}))
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path / "other")
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"\[distill\.teachers\.second\] model = .*token '<another>' has id None"):
        distill.run(replaced(config, second | {"model": str(tmp_path / "other")}), force=False)
    manifest = distill.run(config, force=False)
    assert [each["sources"][0].rpartition("/")[2] for each in manifest["teachers"].values()] == ["notes.md", "pairs.jsonl"]
    before = {name: each["kl_before_nats"] for name, each in manifest["teachers"].items()}
    assert manifest["eval"]["kl_after_nats"] < manifest["eval"]["kl_before_nats"]
    lines = [line for line in RunFolder(config).folder("distill").read_jsonl("metrics.jsonl") if "loss" in line]
    assert all({"kl_teacher", "kl_second"} <= line["terms"].keys() for line in lines)
    card = (RunFolder(config).folder("distill").local("student") / "README.md").read_text()
    assert "- Teacher second: narrow; taught pairs.jsonl, with weight 3" in card
    assert str(tmp_path) not in card
    told = manifest["teacher_targets"]
    assert told["read"] > 0 < told["computed"] and told["cached_bytes"] > 0
    pooled = replaced(config, second, targets="pool", cache={}, max_steps=2, pool={"memory": "2GiB"})
    again = distill.run(pooled, force=True)
    rounded = pytest.approx(before, rel=1e-2)  # a teacher in a worker may compute in bfloat16, one in a pool in float32
    assert {name: each["kl_before_nats"] for name, each in again["teachers"].items()} == rounded
    assert again["teacher_targets"]["pool_actors"] == 2


def replaced(config, second, **changes):
    """Return a config with another second teacher and other fields of [distill]."""
    tree = config.model_dump()
    tree["distill"] |= {"teachers": {"second": second}, **changes}
    return validate(tree)
