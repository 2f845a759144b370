"""Answers that the student writes while it trains: what is scored, what stays, and that runs are exact, on a tiny model."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GenerationConfig

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.cache import CachedTargets, KeptHidden
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.on_policy import OnPolicyLoss, check_on_policy
from ray_jobs.distillation.own_answers import ExponentialRace, Writing, rewrite
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.student import build_student
from ray_jobs.distillation.targets import LazyTeacher, WorkerTeacher
from ray_jobs.training.batches import IGNORE, PackedRows, collate
from ray_jobs.training.loop import evaluate, train
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe

ROWS = [[(5, 6), (4, 3)], [(7, 4)], [(3, 8), (6, 5)], [(4, 4), (1, 6)], [(8, 3)], [(5, 5)]]
"""Prompt and answer of each example."""
GREEDY = Writing(6, 1e-4, 32)
SAMPLED = GREEDY._replace(temperature=1.0)


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return load_model(tiny_model, dtype=torch.float32)


@pytest.fixture
def student(teacher):
    return build_student(teacher, [0, 3])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("rows"), []
    for i, examples in enumerate(ROWS):
        tokens = list(range(1000 * i + 100, 1000 * i + 100 + sum(map(sum, examples))))
        trained = [place >= prompt for prompt, answer in examples for place in range(prompt + answer)]
        labels = [token if is_label else IGNORE for token, is_label in zip(tokens, trained, strict=True)]
        found.append({"row_id": str(i), "input_ids": tokens, "labels": labels, "segment_lengths": [sum(each) for each in examples]})
    pq.write_table(pa.Table.from_pylist(found), folder / "part-0.parquet")
    return PackedRows(folder)


def distil(teacher, student, rows, *, share, loss=None, targets=None, **changes):
    options = {"divergence": Divergence("reverse_kl"), "kd_weight": 0.9, "ce_weight": 0.1}
    loss = loss or OnPolicyLoss(targets or WorkerTeacher(teacher), share=share, writing=SAMPLED, **options)
    recipe = {"max_steps": 4, "learning_rate": 3e-3, "global_batch_size": 4, "dtype": "float32", "log_every_steps": 1}
    given = {name: changes.pop(name) for name in ("on_checkpoint", "resume_from") if name in changes}
    progress = train(student, loss, rows, eval_rows=None, recipe=Recipe(**recipe | changes), **given)
    return [parameter.detach().clone() for parameter in student.parameters()], [line for line in progress.log if "loss" in line]


def examples_of(batch):
    """Prompt and answer of each labelled example, as lists."""
    found = []
    for ids, positions, labels in zip(batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT, strict=True):
        starts = (positions == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            is_label = labels[start:end] != IGNORE
            if is_label.any():
                assert torch.equal(positions[start:end], torch.arange(end - start))
                found.append((ids[start:end][~is_label].tolist(), labels[start:end][is_label].tolist()))
    return found


def test_each_scored_token_is_the_students_own_as_generate_alone_writes_it(student, rows):
    batch = collate([rows[index] for index in (0, 1, 2)])
    new, count = rewrite(student, batch, GREEDY, key=(0, 0))
    ends = student.generation_config.eos_token_id
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0)
    wanted = []
    for prompt, _ in examples_of(batch):
        whole = student.generate(torch.tensor([prompt]), generation_config=settings)
        wanted.append((prompt, whole[0, len(prompt) :].tolist()))
    assert examples_of(new) == wanted
    assert count == sum(len(answer) for _, answer in wanted) == new.num_valid


def test_draws_follow_the_softened_distribution_and_never_leave_the_vocabulary():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 9.0])
    draw = ExponentialRace([np.random.default_rng(0)] * 20000, 2.0, 4)
    kept = draw(torch.zeros(20000, 3), logits.expand(20000, 5))
    assert ((kept == 0).sum(-1) == 1).all()
    share = kept.argmax(-1).bincount(minlength=5) / 20000
    torch.testing.assert_close(share, torch.cat([(logits[:4] / 2).softmax(-1), torch.zeros(1)]), atol=0.015, rtol=0)


def test_a_row_writes_the_same_in_any_batch_and_other_steps_write_otherwise(student, rows):
    together = examples_of(rewrite(student, collate([rows[0], rows[1], rows[2]]), SAMPLED, key=(7, 3))[0])
    alone = [each for i in (0, 1, 2) for each in examples_of(rewrite(student, collate([rows[i]]), SAMPLED, key=(7, 3))[0])]
    later = examples_of(rewrite(student, collate([rows[0], rows[1], rows[2]]), SAMPLED, key=(7, 4))[0])
    assert together == alone
    assert [prompt for prompt, _ in later] == [prompt for prompt, _ in together]
    assert later != together


def test_a_row_stays_within_its_tokens_and_running_text_and_filling_stay_as_they_are(student, rows):
    tight = rewrite(student, collate([rows[0]]), GREEDY._replace(row_tokens=18), key=(0, 0))[0]
    assert [len(answer) for _, answer in examples_of(tight)] == [4, 4]  # of 6 each, where 9 tokens are left
    full = rewrite(student, collate([rows[4]]), GREEDY._replace(row_tokens=9), key=(0, 0))[0]
    assert [len(answer) for _, answer in examples_of(full)] == [1]
    mixed = examples_of(rewrite(student, collate([rows[3]]), GREEDY, key=(0, 0))[0])
    assert mixed[1] == examples_of(collate([rows[3]]))[1]
    nothing = rows[1]._replace(labels=rows[1].labels * 0 + IGNORE)
    same, count = rewrite(student, collate([nothing]), GREEDY, key=(0, 0))
    assert (same.num_valid, count) == (0, 0)


def test_an_answer_ends_with_its_first_end_token(student, rows):
    batch = collate([rows[1]])
    ((_, whole),) = examples_of(rewrite(student, batch, GREEDY, key=(0, 0))[0])
    ended, count = rewrite(student, batch, GREEDY._replace(end_tokens=(whole[0],)), key=(0, 0))
    assert [answer for _, answer in examples_of(ended)] == [whole[:1]]
    assert count == 1


def test_no_share_is_the_plain_loss_bit_for_bit(teacher, rows):
    plain = DistillLoss(WorkerTeacher(teacher), divergence=Divergence("reverse_kl"), kd_weight=0.9, ce_weight=0.1)
    one, lines = distil(teacher, build_student(teacher, [0, 3]), rows, share=0.0, max_steps=2)
    other, _ = distil(teacher, build_student(teacher, [0, 3]), rows, share=0.0, loss=plain, max_steps=2)
    assert all(map(torch.equal, one, other))
    assert [line["counts"]["on_policy_tokens"] for line in lines] == [0, 0]


def test_the_share_of_steps_is_exact_and_own_steps_leave_out_the_labels(teacher, student, rows):
    _, lines = distil(teacher, student, rows, share=0.5)
    assert [line["counts"]["on_policy_tokens"] > 0 for line in lines] == [False, True, False, True]
    for line, weight in zip(lines, [0.1, 0.0] * 2, strict=True):
        assert line["loss"] == pytest.approx(0.9 * line["terms"]["reverse_kl"] + weight * line["terms"]["ce"], rel=1e-5)
    loss = OnPolicyLoss(WorkerTeacher(teacher), share=0.3, writing=GREEDY, divergence=Divergence())
    assert sum(map(loss.draws, range(1000))) == 300


def test_a_step_on_own_answers_leaves_the_balance_of_the_texts_labels_as_it_was(teacher, student, rows):
    options = {"divergence": Divergence("reverse_kl"), "kd_weight": 0.9, "ce_weight": 0.1, "balanced": True}
    loss = OnPolicyLoss(WorkerTeacher(teacher), share=0.5, writing=SAMPLED, **options)
    _, lines = distil(teacher, student, rows, share=0.5, loss=loss, max_steps=3)
    first, own, after = (line["terms"] for line in lines)
    assert own["reverse_kl"] != pytest.approx(first["reverse_kl"], rel=0.01)
    factor = first["reverse_kl"] / first["ce"]
    assert lines[2]["loss"] == pytest.approx(0.9 * after["reverse_kl"] + 0.1 * factor * after["ce"], rel=1e-5)


def test_a_resumed_run_equals_the_undisturbed_one_and_a_split_step_the_whole(teacher, rows, tmp_path):
    def keep(step, save):
        (tmp_path / str(step)).mkdir()
        save(tmp_path / str(step))

    whole, lines = distil(teacher, build_student(teacher, [0, 3]), rows, share=0.5, checkpoint_every_steps=3, on_checkpoint=keep)
    resumed, again = distil(teacher, build_student(teacher, [0, 3]), rows, share=0.5, resume_from=tmp_path / "3")
    assert all(map(torch.equal, whole, resumed))
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    split, parts = distil(teacher, build_student(teacher, [0, 3]), rows, share=0.5, micro_batch_size=1)
    assert [line["counts"]["on_policy_tokens"] for line in parts] == [line["counts"]["on_policy_tokens"] for line in lines]
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_divergence_falls_on_its_own_answers_and_on_the_text(teacher, student, rows):
    loss = OnPolicyLoss(WorkerTeacher(teacher), share=1.0, writing=SAMPLED, divergence=Divergence("reverse_kl"), ce_weight=0.1)
    before = evaluate(student, loss, rows)["terms"]["kl"]
    _, lines = distil(teacher, student, rows, share=1.0, loss=loss, max_steps=12)
    assert lines[-1]["terms"]["reverse_kl"] < 0.8 * lines[0]["terms"]["reverse_kl"]
    assert evaluate(student, loss, rows)["terms"]["kl"] < before


def test_a_cache_keeps_the_text_and_none_of_the_students_answers(teacher, rows, tmp_path):
    loads = []
    for kind, number in (("targets_computed", 5), ("targets_read", 8)):  # the second run reads all text, and asks for its own answers alone
        inner = LazyTeacher(lambda: loads.append(teacher) or teacher, lambda: teacher.get_output_embeddings().weight)
        store = ShardStore(Storage(str(tmp_path)), kind="hidden", budget_bytes=2**30)
        targets = CachedTargets(inner, store, identity="teacher", kept=KeptHidden(64, torch.float32), epoch_rows=1)
        cached, lines = distil(teacher, build_student(teacher, [0, 3]), rows, share=0.5, targets=targets)
        assert sum(line["counts"][kind] for line in lines) == number
        assert [line["counts"]["targets_computed"] + line["counts"]["targets_read"] for line in lines] == [4, 0, 4, 0]
    assert len(loads) == 2, "the teacher stays between the steps that need it"
    plain, _ = distil(teacher, build_student(teacher, [0, 3]), rows, share=0.5)
    for one, other in zip(cached, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_cannot_write_or_learn_by_it_is_refused():
    section = {"on_policy": {"share": 0.5}, "kd_weight": 0.9}
    check_on_policy(section, cuts_parameters=False)
    check_on_policy({"on_policy": {"share": 0.0}, "kd_weight": 0.0}, cuts_parameters=True)
    with pytest.raises(ConfigError, match=r'on_policy.share = 0.5: .* cut in pieces .* workers.strategy = "ddp"'):
        check_on_policy(section, cuts_parameters=True)
    with pytest.raises(ConfigError, match=r"on_policy.share = 0.5 with kd_weight = 0: .* set kd_weight above 0"):
        check_on_policy(section | {"kd_weight": 0.0}, cuts_parameters=False)
