"""The student's first weights: cut from files, with an adapter, random, quantized; and the teacher as it is stored."""

import itertools

import pytest
import torch
import torch.distributed as dist
from packed_rows import write_rows
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.run_folder import ModelSource
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.influence import influence_table, measure_influence, most_influential
from ray_jobs.distillation.making import Student
from ray_jobs.distillation.start import Start, cut_model, load_start
from ray_jobs.distillation.student import build_student
from ray_jobs.distillation.teacher import load_teacher
from ray_jobs.training.adapters import add_lora, load_merged
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.models import Quantization, load_model

IDS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same_model(logits_BTV, expected_BTV, kind):
    """Equal to 1e-4; int8 products round their input too, which dequantized weights do not show: 1% measured, 3% allowed."""
    if kind == "int8":
        assert float((logits_BTV - expected_BTV).norm() / expected_BTV.norm()) < 0.03
    else:
        torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4)


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """An adapter on the tiny model whose matrices are not zero."""
    torch.manual_seed(3)
    model = add_lora(load_model(tiny_model, dtype=torch.float32), rank=4, alpha=8, dropout=0.0, targets="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_what_is_cut_from_files_is_what_is_cut_from_the_teacher_in_memory(tiny_model, adapter):
    for source in (None, adapter):
        teacher = load_teacher(str(tiny_model), source, dtype=torch.float32)
        cut = load_start(Start(str(tiny_model), (0, 2, 3), source), dtype=torch.float32)
        torch.testing.assert_close(logits(cut), logits(build_student(teacher, [0, 2, 3]).eval()))
        assert cut.generation_config.to_diff_dict() == teacher.generation_config.to_diff_dict()


def test_a_worker_that_is_not_the_first_starts_alike(tiny_model, adapter):
    start = Start(str(tiny_model), (0, 3), adapter)
    first = load_start(start, dtype=torch.float32)
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        second = load_start(start, dtype=torch.float32)
    finally:
        dist.destroy_process_group()
    assert torch.equal(logits(first), logits(second))


def test_families_with_names_of_their_own_are_cut_from_files_too(tmp_path):
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_head=2, n_layer=4)).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    cut_model(tmp_path / "teacher", (1, 3), tmp_path / "cut")
    torch.testing.assert_close(logits(load_model(tmp_path / "cut", dtype=torch.float32)), logits(build_student(teacher, [1, 3]).eval()))


def test_random_starts_are_equal_by_seed_have_the_shapes_and_leave_the_callers_randomness_alone(tiny_model):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (load_start(Start(str(tiny_model), (0, 3), None, seed), dtype=torch.float32) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(one), logits(same))
    assert not torch.allclose(logits(one), logits(other))
    cut = load_start(Start(str(tiny_model), (0, 3)), dtype=torch.float32)
    assert [(n, p.shape) for n, p in one.named_parameters()] == [(n, p.shape) for n, p in cut.named_parameters()]
    assert not torch.equal(one.get_input_embeddings().weight, cut.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_teacher_keeps_its_adapter_beside_its_weights(tiny_model, adapter, kind):
    quantization = Quantization(kind)
    attached = logits(load_teacher(str(tiny_model), adapter, dtype=torch.float32, quantization=quantization))
    stored = logits(load_merged(tiny_model, adapter, dtype=torch.float32, quantization=quantization))
    assert_same_model(attached, stored, kind)
    assert not torch.allclose(attached, logits(load_teacher(str(tiny_model), adapter, dtype=torch.float32)), atol=1e-3)


@pytest.mark.parametrize(("method", "kind"), [("lora", "nf4"), ("qlora", "nf4"), ("qlora", "int8")])
def test_the_merged_student_is_the_model_that_was_trained(tiny_model, adapter, tmp_path, method, kind):
    student = Student(
        Start(str(tiny_model), (0, 3), adapter),
        tokenizer=str(tiny_model),
        method=method,
        dtype="float32",
        lora={"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"},
        quantization=Quantization(kind),
    )
    model = student.load("cpu")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    torch.manual_seed(4)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    student.write(model, tmp_path / "stage" / "adapter", device="cpu")
    student.write_merged(Storage(str(tmp_path / "stage")), device="cpu")
    written = load_model(tmp_path / "stage" / "student", dtype=torch.float32)
    assert written.config.num_hidden_layers == 2
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "stage" / "student"), "quantization_config")
    with_adapter = logits(model.eval())
    assert_same_model(logits(written), with_adapter, kind)
    with model.disable_adapter(), pytest.raises(AssertionError):
        assert_same_model(logits(model), with_adapter, kind)


def test_influence_is_1_minus_the_mean_cosine_at_valid_positions(tiny_model, tmp_path):
    rows = PackedRows(write_rows(tmp_path / "rows", [(9, 7), (12,), (5, 5, 6)]))
    model = load_model(tiny_model, dtype=torch.float32)
    found = measure_influence(model, rows, seed=0)
    assert (found["rows"], len(found["influence"])) == (3, 4)
    sums, count = torch.zeros(4), 0
    for row in (rows[index] for index in range(3)):
        ids, places, last = torch.tensor(row.input_ids)[None], torch.tensor(row.position_ids)[None], []
        hook = model.model.layers[-1].register_forward_hook(lambda *arguments, last=last: last.append(arguments[-1]))
        with torch.no_grad():
            states = model(ids, position_ids=places, output_hidden_states=True, use_cache=False).hidden_states
        hook.remove()
        states = [*states[:-1], last[0]]  # transformers gives the last ones after the final norm
        valid = torch.tensor(row.labels[1:] != -100)
        cosines = [torch.cosine_similarity(a[0, :-1][valid], b[0, :-1][valid], dim=-1) for a, b in itertools.pairwise(states)]
        sums += torch.stack([cosine.sum() for cosine in cosines])
        count += int(valid.sum())
    assert found["positions"] == count
    torch.testing.assert_close(torch.tensor(found["influence"]), 1 - sums / count, rtol=1e-4, atol=1e-5)
    assert measure_influence(model, rows, seed=0) == found


def test_a_layer_that_changes_nothing_goes_first(tiny_model, tmp_path):
    rows = PackedRows(write_rows(tmp_path / "rows", [(9, 7), (12,)]))
    model = load_model(tiny_model, dtype=torch.float32)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).weight.data.zero_()
    found = measure_influence(model, rows, seed=0)
    assert found["influence"][1] == pytest.approx(0, abs=1e-6)
    kept = most_influential(found["influence"], 3)
    assert kept == [0, 2, 3]
    assert [line.count("*") for line in influence_table(found, kept)] == [1, 3]
    assert most_influential([0.5, 0.5, 0.1, 0.5], 2) == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distill__method": "lora", "student__start": "random"}, "adapters leave the random weights"),
        ({"distill__method": "lora", "distill__lora": {"rank": 65}}, r"distill.lora.rank = 65 is larger than layer"),
        (
            {"distill__method": "qlora", "distill__quantization": {"type": "int8"}, "distill__lora": {"dora": True}},
            r"distill.lora.dora = true cannot be trained on distill.quantization.type",
        ),
        (
            {"distill__method": "qlora", "distill__quantization": {"type": "int8"}, "workers__strategy": "fsdp"},
            r"\[workers\] strategy = \"fsdp\"",
        ),
        ({"student__choose": "influence", "student__layers": 5}, r"student.layers = 5, but the teacher has 4"),
        ({"distill__vocabulary": "uld"}, r"does not go with a student built from the teacher \(set student.model\)"),
    ],
)
def test_students_that_cannot_be_are_refused_before_anything_starts(tiny_config, wrong, message):
    from ray_jobs import distill

    with pytest.raises(ConfigError, match=message):
        distill.check(tiny_config(**wrong))


def test_a_cache_tells_apart_how_the_constants_of_a_quantized_teacher_are_stored(tiny_config):
    from ray_jobs import distill

    def stored_as(kind, double):
        config = tiny_config(distill__teacher_quantization=kind, finetune__quantization={"double_quantization": double})
        return distill.make_job(config, ModelSource(config.teacher.model)).stored_as

    assert len({stored_as(kind, double) for kind in ("nf4", "fp4") for double in (True, False)}) == 4
    assert {stored_as("none", double) for double in (True, False)} == {"none"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"student__choose": "influence", "student__layers": [0, 1]}, "remove one of both"),
        ({"student__start": "random", "student__model": "smollm2-135m-instruct"}, "is for a student built from the teacher"),
    ],
)
def test_choices_without_anything_to_choose_are_refused_by_the_config(tiny_config, wrong, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**wrong)


def test_the_parameters_told_are_those_of_the_models_without_what_training_adds(tiny_config, tiny_model):
    from ray_jobs import distill

    job = distill.make_job(tiny_config(distill__method="lora"), ModelSource(str(tiny_model)))
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = job.student_from(job.first_start()).load("cpu")
    adapter = student.num_parameters(only_trainable=True)
    assert job.num_parameters == {"teacher": teacher.num_parameters(), "student": student.num_parameters() - adapter}
