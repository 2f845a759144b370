"""distill on a real cluster: a plain student folder, numbers that point the right way, refusals before anything starts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_jobs import distill, finetune, prepare
from ray_jobs.core.errors import ConfigError, StageMissing
from ray_jobs.core.run_folder import RunFolder

pytestmark = pytest.mark.cluster


@pytest.fixture
def finetuned(tiny_config, ray_cluster):
    """A tiny config whose `prepare` and `finetune` have finished, as a function of overrides."""

    def make(**overrides):
        config = tiny_config(**overrides)
        prepare.run(config, force=False)
        finetune.run(config, force=False)
        return config

    return make


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
