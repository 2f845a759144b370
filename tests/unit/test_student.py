"""The student cut from its teacher, and the distillation loss on real model classes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.layers import choose_layers
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.student import build_student, shrink_config
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import cross_entropy_loss

SHAPE = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def llama(num_layers=6, seed=0, **overrides):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": num_layers} | overrides)).eval()


def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (2, 12))
    labels = ids.masked_fill(torch.rand(2, 12) < 0.4, -100)
    labels[:, 0] = -100
    return Batch(ids, torch.arange(12).expand(2, 12), labels)


@pytest.mark.parametrize(("total", "keep"), [(30, 20), (12, 6), (7, 7), (5, 2), (32, 16), (3, 1)])
def test_evenly_spaced_layers_rise_and_keep_both_ends(total, keep):
    chosen = choose_layers(total, keep)
    assert len(chosen) == keep
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert keep == 1 or chosen[-1] == total - 1
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (7, "student.layers = 7, but the teacher has 6"),
        ([0, 6], "layer 6 is out of range"),
        ([], "the list is empty"),
        ([2, 0], "in rising order"),
        ([0, 0, 1], "each layer once"),
    ],
)
def test_layers_that_cannot_be_are_refused_in_one_line(layers, words):
    with pytest.raises(ConfigError, match=words) as caught:
        choose_layers(6, layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_student_of_all_layers_is_the_teacher(tied):
    teacher = llama(tie_word_embeddings=tied)
    student = build_student(teacher, list(range(6)))
    ids = torch.arange(10)[None]
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits)


def test_student_has_the_chosen_layers_and_the_ends_of_the_teacher():
    teacher = llama().to(torch.bfloat16)
    student = build_student(teacher, [0, 3, 5])
    assert student.config.num_hidden_layers == 3
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    for new, old in enumerate([0, 3, 5]):
        for name, weight in student.model.layers[new].named_parameters():
            assert torch.equal(weight, teacher.model.layers[old].get_parameter(name).float())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name).float())
    student.model.norm.weight.data += 1
    assert not torch.equal(student.model.norm.weight, teacher.model.norm.weight.float()), "the student must not share memory"


def test_settings_of_each_layer_follow_the_layers():
    config = Qwen3Config(
        **SHAPE, head_dim=8, num_hidden_layers=4, layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"]
    )
    small = shrink_config(config, [1, 3])
    assert small.num_hidden_layers == 2
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert config.num_hidden_layers == 4
    assert build_student(Qwen3ForCausalLM(config), [1, 3]).config.layer_types == small.layer_types


def test_families_with_names_of_their_own_can_be_cut():
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_head=2, n_layer=4)).eval()
    student = build_student(teacher, [0, 3])
    assert student.config.n_layer == 2
    assert torch.equal(student.transformer.h[1].mlp.c_fc.weight, teacher.transformer.h[3].mlp.c_fc.weight)


def test_exported_student_is_a_plain_folder(tmp_path):
    student = build_student(llama(), [0, 5])
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(again(ids).logits, student.eval()(ids).logits)


def test_loss_equals_the_models_own_logits_and_logs_terms_apart():
    teacher, student, rows = llama(), llama(2, seed=5), batch()
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(temperature=2.0), kd_weight=0.7, ce_weight=0.3)(student, rows)
    valid = rows.labels_BT[:, 1:] != -100
    mine, theirs = (model(rows.input_ids_BT).logits[:, :-1][valid] for model in (student, teacher))
    kl = F.kl_div(F.log_softmax(mine / 2, -1), F.softmax(theirs / 2, -1), reduction="sum") * 4
    ce = F.cross_entropy(mine, rows.labels_BT[:, 1:][valid], reduction="sum")
    torch.testing.assert_close(loss.terms, {"kl": kl.detach(), "ce": ce.detach()}, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.total, 0.7 * kl + 0.3 * ce, rtol=1e-4, atol=1e-4)
    loss.total.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_evaluation_measures_the_plain_divergence_at_any_temperature():
    teacher, student, rows = llama(), llama(2, seed=5), batch()
    with torch.no_grad():
        seen = [
            DistillLoss(WorkerTeacher(teacher), divergence=Divergence(temperature=t), kd_weight=1, ce_weight=0)(student, rows).terms
            for t in (1.0, 4.0)
        ]
    assert seen[0] == seen[1]
    torch.testing.assert_close(seen[0]["ce_teacher"], cross_entropy_loss(teacher, rows).total)
