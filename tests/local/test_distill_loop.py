"""Distillation on the one training loop, in one process, on a tiny model."""

import copy
import itertools

import pytest
import torch
from packed_rows import write_rows
from transformers import LlamaForCausalLM

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.by_source import TeachersBySource
from ray_jobs.distillation.cache import CachedTargets, KeptHidden, KeptTopK
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.hidden_states import HiddenLoss, add_projection, drop_projection
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.self_check import check_loss
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.student import build_student
from ray_jobs.distillation.targets import HiddenTarget, LazyTeacher, SeveralTarget, WorkerTeacher
from ray_jobs.distillation.topk import TopKCodec, TopKTarget
from ray_jobs.training.batches import PackedRows, collate
from ray_jobs.training.loop import evaluate, train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13)]


@pytest.fixture
def rows(tmp_path):
    return PackedRows(write_rows(tmp_path / "rows", SEGMENTS))


def distil(tiny_model, rows, *, student=None, kd_weight=0.9, ce_weight=0.1, **changes):
    torch.manual_seed(0)
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = student or build_student(teacher, [0, 3])
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(temperature=2.0), kd_weight=kd_weight, ce_weight=ce_weight)
    recipe = Recipe(**{"max_steps": 8, "learning_rate": 3e-3, "global_batch_size": 4, "dtype": "float32"} | changes)
    return student, train(student, loss, rows, eval_rows=rows, recipe=recipe)


def test_divergence_falls_and_terms_are_logged_apart(tiny_model, rows):
    _, progress = distil(tiny_model, rows, max_steps=20, kd_weight=1.0, ce_weight=0.0)
    before, after = progress.eval_before["terms"], progress.eval_after["terms"]
    assert after["kl"] < 0.7 * before["kl"]
    assert before["ce_teacher"] == after["ce_teacher"]
    steps = [line for line in progress.log if "loss" in line]
    assert all(line["terms"].keys() == {"kl", "ce"} for line in steps)


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_model, rows):
    _, progress = distil(tiny_model, rows, max_steps=2)
    for line in (line for line in progress.log if "loss" in line):
        assert line["loss"] == pytest.approx(0.9 * line["terms"]["kl"] + 0.1 * line["terms"]["ce"], rel=1e-5)


def test_a_student_of_all_layers_has_nothing_to_learn(tiny_model, rows):
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = build_student(teacher, [0, 1, 2, 3])
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(temperature=2.0), kd_weight=1.0, ce_weight=0.0)
    terms = evaluate(student, loss, rows)["terms"]
    assert terms["kl"] < 1e-6
    assert terms["ce"] == pytest.approx(terms["ce_teacher"], rel=1e-5)
    assert terms["ce_teacher"] == pytest.approx(evaluate(teacher, cross_entropy_loss, rows)["loss"], rel=1e-5)


def test_splitting_a_step_changes_nothing(tiny_model, rows):
    whole, split = (distil(tiny_model, rows, micro_batch_size=size, max_steps=3)[0] for size in (4, 1))
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def segments(rows):
    """Every example as a row of its own."""
    for row in (rows[index] for index in range(len(rows))):
        starts = [*(int(place) for place in (row.position_ids == 0).nonzero()[0]), len(row.input_ids)]
        for one, next_one in itertools.pairwise(starts):
            yield row.cut(slice(one, next_one))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "total_variation"])
def test_gradients_are_equal_split_packed_or_padded(tiny_model, rows, kind):
    torch.manual_seed(0)
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = build_student(teacher, [0, 3])
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(kind, temperature=2.0), kd_weight=0.9, ce_weight=0.1)
    packed = [rows[index] for index in range(len(rows))]
    ways = [[collate(packed)], [collate([row]) for row in packed], [collate(list(segments(rows)))]]
    found = []
    for batches in ways:
        student.zero_grad()
        for batch in batches:
            loss(student, batch).total.backward()
        found.append([parameter.grad.clone() for parameter in student.parameters()])
    for whole, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)


HIDDEN = {"last": HiddenLoss(1.0, "cosine"), "mapped": HiddenLoss(2.0, "mse", student_layers=(0, 1))}


def narrow_student(teacher):
    """A student of half the teacher's width."""
    torch.manual_seed(1)
    small = copy.deepcopy(teacher.config)
    small.hidden_size, small.num_hidden_layers, small.num_attention_heads, small.head_dim = 32, 2, 2, 16
    student = LlamaForCausalLM(small)
    add_projection(student, teacher.config.hidden_size, seed=0)
    return student


def hidden_parts(tiny_model, where, *, narrow, balanced=False):
    torch.manual_seed(0)
    teacher = load_model(tiny_model, dtype=torch.float32)
    targets = WorkerTeacher(teacher, layers=(0, 3) if where == "mapped" else ())
    student = narrow_student(teacher) if narrow else build_student(teacher, [0, 3])
    return student, DistillLoss(targets, divergence=Divergence(temperature=2.0), ce_weight=0.5, hidden=HIDDEN[where], balanced=balanced)


@pytest.mark.parametrize("where", HIDDEN)
def test_the_hidden_term_equals_one_made_from_the_models_own_states(tiny_model, rows, where):
    student, loss = hidden_parts(tiny_model, where, narrow=False)
    batch = collate([rows[0], rows[1]])
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False, "output_hidden_states": True}
    mine, theirs = (model(**inputs).hidden_states for model in (student, loss.targets.model))
    valid = batch.labels_BT[:, 1:] != -100
    picked = [(mine[-1], theirs[-1])] if where == "last" else [(mine[1], theirs[1])]
    states = [[each[:, :-1][valid].detach() for each in pair] for pair in picked]
    seen = loss(student, batch).terms["hidden"]
    if where == "last":
        want = (1 - torch.nn.functional.cosine_similarity(*states[0], dim=-1)).sum()
    else:  # the student starts with the teacher's first layer, so that only the other pair differs
        assert (states[0][0] - states[0][1]).abs().max() == 0
        outputs = []
        for model in (student, loss.targets.model):
            model.model.norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
            model(**inputs)
        want = (outputs[0] - outputs[1])[:, :-1][valid].square().mean(-1).sum() / 2
    torch.testing.assert_close(seen, want.detach(), rtol=1e-4, atol=1e-5)


def test_equal_hidden_states_have_a_distance_of_0_and_opposite_ones_of_2():
    states = torch.randn(5, 8)
    assert HiddenLoss(1.0, "mse")(torch.nn.Module(), [states], [states]) == 0
    assert HiddenLoss(1.0, "cosine")(torch.nn.Module(), [states], [states]).abs() < 1e-5
    assert HiddenLoss(1.0, "cosine")(torch.nn.Module(), [states], [-states]) == pytest.approx(10.0, rel=1e-5)


@pytest.mark.parametrize("where", HIDDEN)
def test_a_projection_is_trained_kept_in_checkpoints_and_dropped_from_the_export(tiny_model, rows, tmp_path, where):
    student, loss = hidden_parts(tiny_model, where, narrow=True, balanced=True)
    before = student.hidden_projection.weight.detach().clone()
    recipe = Recipe(max_steps=4, learning_rate=3e-3, global_batch_size=4, dtype="float32", checkpoint_every_steps=2)

    def keep(step, save):
        (tmp_path / str(step)).mkdir()
        save(tmp_path / str(step))

    whole = train(student, loss, rows, eval_rows=rows, recipe=recipe, on_checkpoint=keep)
    assert (student.hidden_projection.weight - before).abs().max() > 1e-4
    again, loss = hidden_parts(tiny_model, where, narrow=True, balanced=True)
    resumed = train(again, loss, rows, eval_rows=rows, recipe=recipe, resume_from=tmp_path / "2")
    assert [line["loss"] for line in resumed.log if "loss" in line] == [line["loss"] for line in whole.log if "loss" in line]
    for one, other in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    drop_projection(student)
    student.save_pretrained(tmp_path / "student")
    plain, facts = LlamaForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not facts["unexpected_keys"]
    assert plain.num_parameters() == student.num_parameters()


def test_balanced_terms_weigh_as_much_as_the_divergence_and_alike_for_any_split(tiny_model, rows):
    lines = []
    for size in (4, 1):
        student, loss = hidden_parts(tiny_model, "mapped", narrow=False, balanced=True)
        recipe = Recipe(max_steps=3, learning_rate=3e-3, global_batch_size=4, micro_batch_size=size, dtype="float32")
        progress = train(student, loss, rows, eval_rows=None, recipe=recipe)
        lines.append([line for line in progress.log if "loss" in line])
    first, second, _ = lines[0]
    assert first["loss"] == pytest.approx(first["terms"]["kl"], rel=1e-5)
    scaled = sum(
        weight * second["terms"][name] * first["terms"]["kl"] / first["terms"][name] for name, weight in (("ce", 0.5), ("hidden", 2.0))
    )
    assert second["loss"] == pytest.approx(second["terms"]["kl"] + scaled, rel=1e-5)
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


class WithoutSquare(DistillLoss):
    """Wrong as others were: the temperature's square is missing."""

    def head_loss(self, hidden_NH, head_VH, target, labels_N, divergence):
        whole = super().head_loss(hidden_NH, head_VH, target, labels_N, divergence)
        return whole._replace(total=whole.total / divergence.temperature**2)


class MeanOfMeans(DistillLoss):
    """Wrong as others were: each micro-batch is meaned by itself."""

    def against(self, target, model, batch):
        sums = super().against(target, model, batch)
        return sums._replace(total=sums.total / batch.num_valid)


class OnePositionLate(DistillLoss):
    """Wrong as others were: labels are off by one."""

    def head_loss(self, hidden_NH, head_VH, target, labels_N, divergence):
        return super().head_loss(hidden_NH, head_VH, target, labels_N.roll(1), divergence)


class OtherLayers(DistillLoss):
    """Wrong in what layers meet."""

    def against(self, target, model, batch):
        return super().against(target._replace(layers_NH=target.layers_NH[::-1]), model, batch)


class ForgottenTail(DistillLoss):
    """Wrong in compressed targets: as if the kept tokens were all there are."""

    def head_loss(self, hidden_NH, head_VH, target, labels_N, divergence):
        if isinstance(target, TopKTarget):
            target = target._replace(tail_NG=target.tail_NG - 30)
        return super().head_loss(hidden_NH, head_VH, target, labels_N, divergence)


class Shifted(WorkerTeacher):
    """A teacher whose word is of the position before, or after."""

    shift = 1

    def of(self, batch):
        target = super().of(batch)
        return target._replace(hidden_NH=target.hidden_NH.roll(self.shift, 0))


@pytest.mark.parametrize("wrong", [WithoutSquare, MeanOfMeans, OnePositionLate])
def test_a_wrong_loss_is_found_before_the_first_step(tiny_model, rows, wrong):
    torch.manual_seed(0)
    teacher = load_model(tiny_model, dtype=torch.float32)
    loss = wrong(WorkerTeacher(teacher), divergence=Divergence("jsd", temperature=2.0), kd_weight=0.5, ce_weight=0.5)
    with pytest.raises(TrainingFailed, match=r"self-check of the loss: .* differ .* loss .* against .*, gradients apart by"):
        train(build_student(teacher, [0, 3]), loss, rows, eval_rows=None, recipe=Recipe(max_steps=1, dtype="float32"))


@pytest.mark.parametrize("where", HIDDEN)
@pytest.mark.parametrize("narrow", [False, True])
def test_the_self_check_takes_in_hidden_states_also_projected(tiny_model, rows, where, narrow):
    student, loss = hidden_parts(tiny_model, where, narrow=narrow, balanced=True)
    check_loss(loss, student, [rows[0], rows[1]], torch.bfloat16 if narrow else torch.float32)
    assert loss.balance is not None
    if where == "mapped":
        wrong = OtherLayers(loss.targets, divergence=loss.divergence, hidden=loss.hidden)
        with pytest.raises(TrainingFailed, match=r"the fused loss and the dense reference differ"):
            check_loss(wrong, student, [rows[0], rows[1]], torch.float32)


def test_the_self_check_takes_in_compressed_targets(tiny_model, rows, tmp_path):
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = build_student(teacher, [0, 3])
    store = ShardStore(Storage(str(tmp_path / "cache")), kind="top", budget_bytes=2**30)
    options = {"store": store, "identity": "teacher", "kept": KeptTopK(TopKCodec(16, 49152)), "epoch_rows": 4}
    targets = CachedTargets(LazyTeacher(lambda: teacher, lambda: teacher.get_output_embeddings().weight), **options)
    check_loss(DistillLoss(targets, divergence=Divergence(temperature=2.7)), student, [rows[0], rows[1]], torch.float32)
    with pytest.raises(TrainingFailed, match=r"the fused loss and the dense reference on top-16 targets differ .* loss .* against"):
        check_loss(ForgottenTail(targets, divergence=Divergence()), student, [rows[0], rows[1]], torch.float32)


class EvenShares(DistillLoss):
    """Wrong with several teachers: each weighs the same wherever it speaks, hidden states or top-k as `spoilt` says."""

    spoilt = HiddenTarget

    def head_loss(self, hidden_NH, head_VH, target, labels_N, divergence):
        parts = {
            name: part._replace(shares_M=torch.full_like(part.shares_M, 0.5)) if isinstance(part.target, self.spoilt) else part
            for name, part in target.parts.items()
        }
        return super().head_loss(hidden_NH, head_VH, SeveralTarget(parts), labels_N, divergence)


def test_the_self_check_takes_in_several_teachers_and_their_compressed_targets(tiny_model, rows, tmp_path):
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = build_student(teacher, [0, 3])
    store = ShardStore(Storage(str(tmp_path / "cache")), kind="top", budget_bytes=2**30)
    options = {"store": store, "identity": "teacher", "kept": KeptTopK(TopKCodec(16, 49152)), "epoch_rows": 4}
    several = TeachersBySource({"teacher": WorkerTeacher(teacher), "law": CachedTargets(WorkerTeacher(teacher), **options)}, torch.eye(2))
    loss = DistillLoss(several, divergence=Divergence("jsd", temperature=2.0), kd_weight=0.9, ce_weight=0.1)
    check_loss(loss, student, [rows[0], rows[1]], torch.float32)
    for spoilt, where in ((HiddenTarget, ""), (TopKTarget, " on top-16 targets")):
        wrong = EvenShares(several, divergence=Divergence())
        wrong.spoilt = spoilt
        with pytest.raises(TrainingFailed, match=rf"the fused loss and the dense reference of 2 teachers{where} differ"):
            check_loss(wrong, student, [rows[0], rows[1]], torch.float32)


@pytest.mark.parametrize(("shift", "kept", "seen"), [(1, False, 0), (-1, True, 3)])
def test_a_teacher_whose_word_is_of_other_positions_stops_the_job_before_the_first_step(tiny_model, rows, tmp_path, shift, kept, seen):
    teacher = Shifted(load_model(tiny_model, dtype=torch.float32))
    teacher.shift = shift
    student = build_student(teacher.model, [0, 3])
    before = copy.deepcopy(student.state_dict())
    store = ShardStore(Storage(str(tmp_path / "cache")), kind="hidden", budget_bytes=2**30)
    options = {"store": store, "identity": "teacher", "kept": KeptHidden(64, torch.float32), "epoch_rows": 4}
    loss = DistillLoss(CachedTargets(teacher, **options) if kept else teacher, divergence=Divergence())
    with pytest.raises(TrainingFailed, match=rf"differ from position 4 on the targets differ from position {seen} on \(relative gaps 0"):
        train(student, loss, rows, eval_rows=None, recipe=Recipe(max_steps=1, dtype="float32"))
    assert all(torch.equal(before[name], each) for name, each in student.state_dict().items())


def test_right_losses_pass_the_self_check_and_leave_the_model_as_it_was(tiny_model, rows):
    teacher = load_model(tiny_model, dtype=torch.float32)
    student = build_student(teacher, [0, 3]).train()
    cases = [(kind, torch.float32) for kind in ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation")]
    for kind, dtype in [*cases, ("jsd", torch.bfloat16)]:
        loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(kind, temperature=2.0), kd_weight=0.9, ce_weight=0.1)
        check_loss(loss, student, [rows[0], rows[1]], dtype)
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())
