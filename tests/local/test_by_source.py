"""Several teachers by data source, from packed rows to the gradient: against each example alone, dense; split, packed, kept, on-policy."""

import itertools

import pytest
import torch
from packed_rows import write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.by_source import TeachersBySource
from ray_jobs.distillation.cache import CachedTargets, KeptHidden
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.on_policy import OnPolicyLoss
from ray_jobs.distillation.own_answers import Writing
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.batches import IGNORE, PackedRows, collate
from ray_jobs.training.loop import evaluate, train
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (8, 8)]
NAMES = ["a.md", "b.md", "c.jsonl"]
SOURCES = [("a.md", "b.md"), ("c.jsonl",), ("b.md", "b.md", "a.md"), ("c.jsonl", "a.md")]
SHARES = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]], dtype=torch.float64)
"""Of the two teachers in each source."""
WEIGHTS = {"divergence": Divergence(temperature=2.0), "kd_weight": 0.9, "ce_weight": 0.1}


def llama(width, layers, *, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double().eval()


class Asked(WorkerTeacher):
    """A teacher that remembers the tokens it was asked for."""

    def __init__(self, model):
        super().__init__(model)
        self.tokens = []

    def of(self, batch):
        self.tokens.append(batch.input_ids_BT.tolist())
        return super().of(batch)

    def probe(self, batch):
        return super().of(batch)


@pytest.fixture
def rows(tmp_path):
    return PackedRows(write_rows(tmp_path / "rows", SEGMENTS, sources=SOURCES), sources=NAMES)


@pytest.fixture
def teachers():
    return {"teacher": Asked(llama(16, 2, seed=1)), "law": Asked(llama(24, 1, seed=2))}


def examples(rows):
    """Every example as a row of its own."""
    for row in (rows[index] for index in range(len(rows))):
        starts = [*(int(place) for place in (row.position_ids == 0).nonzero()[0]), len(row.input_ids)]
        yield from (row.cut(slice(*ends)) for ends in itertools.pairwise(starts))


def by_hand(student, teachers, rows):
    """Return the loss and each teacher's KL at temperature 2 and its tokens, from whole logits of each example alone."""
    total, each, tokens = torch.zeros((), dtype=torch.float64), dict.fromkeys(teachers, 0.0), dict.fromkeys(teachers, 0)
    for row in examples(rows):
        ids = torch.tensor(row.input_ids)[None].long()
        mine = student(ids).logits[0, :-1]
        log_q = (mine / 2).log_softmax(-1)
        total = total + 0.1 * torch.nn.functional.cross_entropy(mine, ids[0, 1:], reduction="sum")
        for share, (name, teacher) in zip(SHARES[row.sources[0]], teachers.items(), strict=True):
            with torch.no_grad():
                log_p = (teacher.model(ids).logits[0, :-1] / 2).log_softmax(-1)
            kl = 4 * (log_p.exp() * (log_p - log_q)).sum()
            total = total + 0.9 * share * kl
            if share:
                each[name] += float(kl.detach())
                tokens[name] += len(log_q)
    return total, each, tokens


def gradients(total, student):
    return torch.autograd.grad(total, list(student.parameters()))


def test_value_and_gradient_are_those_of_each_example_alone_dense(rows, teachers):
    student, loss = llama(12, 1, seed=3), DistillLoss(TeachersBySource(teachers, SHARES), **WEIGHTS)
    found = loss(student, collate([rows[index] for index in range(len(rows))]))
    want, each, tokens = by_hand(student, teachers, rows)
    torch.testing.assert_close(found.total, want)
    for mine, theirs in zip(gradients(found.total, student), gradients(want, student), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert {name: float(found.terms[f"kl_{name}"]) for name in teachers} == pytest.approx(each)
    assert found.tokens == {f"kl_{name}": num for name, num in tokens.items()}


def test_gradients_are_equal_split_packed_or_padded(rows, teachers):
    student, loss = llama(12, 1, seed=3), DistillLoss(TeachersBySource(teachers, SHARES), **WEIGHTS)
    packed = [rows[index] for index in range(len(rows))]
    ways = [[collate(packed)], [collate([row]) for row in packed[::-1]], [collate(list(examples(rows)))]]
    found = []
    for batches in ways:
        sums = [loss(student, batch) for batch in batches]
        assert {name: sum(each.tokens[name] for each in sums) for name in sums[0].tokens} == {"kl_teacher": 34, "kl_law": 32}
        found.append(gradients(sum(each.total for each in sums), student))
    for whole, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, whole)


def test_a_teacher_is_asked_for_the_examples_of_its_sources_alone(rows, teachers):
    targets = TeachersBySource(teachers, SHARES)
    targets.of(collate([rows[0], rows[1]]))
    assert teachers["teacher"].tokens == [[list(range(16))]]
    assert teachers["law"].tokens == [[[*range(9, 16), 0, 0, 0, 0, 0], list(range(1000, 1012))]]
    nothing = targets.of(collate([rows[1]._replace(labels=rows[1].labels * 0 + IGNORE)]))
    assert nothing.parts == {"teacher": None, "law": None}
    assert len(teachers["law"].tokens) == 1


def test_a_teacher_whose_word_is_of_other_positions_is_found_beside_a_louder_one(rows, teachers):
    class Late(WorkerTeacher):
        def of(self, batch):
            target = super().of(batch)
            return target._replace(hidden_NH=target.hidden_NH.roll(1, 0))

    with torch.no_grad():
        teachers["teacher"].model.get_decoder().norm.weight.mul_(1e4)
    late = Late(teachers["law"].model)
    loss = DistillLoss(TeachersBySource({"teacher": teachers["teacher"], "law": late}, SHARES), **WEIGHTS)
    with pytest.raises(TrainingFailed, match=r"self-check of teacher law: of two rows that differ from position \d on"):
        loss(llama(12, 1, seed=3), collate([rows[index] for index in range(len(rows))]))


def test_terms_are_per_token_that_each_teaches_in_any_split(rows, teachers):
    def lines(**changes):
        student, loss = llama(12, 1, seed=3).float(), DistillLoss(TeachersBySource(single, SHARES), **WEIGHTS)
        recipe = Recipe(max_steps=4, learning_rate=1e-2, global_batch_size=2, dtype="float32", log_every_steps=2, **changes)
        log = train(student, loss, rows, eval_rows=rows, recipe=recipe).log
        return [line.get("terms") or line["eval_terms"] for line in log], student

    single = {name: WorkerTeacher(teacher.model.float()) for name, teacher in teachers.items()}
    (whole, student), (split, _) = lines(micro_batch_size=2), lines(micro_batch_size=1)
    for one, other in zip(whole, split, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert {"kl", "ce", "kl_teacher", "kl_law"} <= one.keys()
    loss = DistillLoss(TeachersBySource(single, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])), **WEIGHTS)
    found = evaluate(student, loss, rows)
    terms, tokens = found["terms"], found["term_tokens"]
    assert tokens == {"kl_teacher": 34, "kl_law": 18}
    assert terms["kl"] * 52 == pytest.approx(terms["kl_teacher"] * 34 + terms["kl_law"] * 18, rel=1e-5)
    only_c = DistillLoss(TeachersBySource(single, torch.tensor([[1.0, 0.0]] * 3)), **WEIGHTS)
    assert "kl_law" not in evaluate(student, only_c, rows)["terms"], "no token is no figure, and not a divergence of 0"


def test_kept_targets_are_read_in_place_of_both_teachers(rows, teachers, tmp_path):
    def targets(asked):
        stores = {name: ShardStore(Storage(str(tmp_path / name)), kind="hidden", budget_bytes=2**20) for name in asked}
        kept = {
            name: CachedTargets(
                each, stores[name], identity=name, kept=KeptHidden(each.model.config.hidden_size, torch.float64), epoch_rows=4
            )
            for name, each in asked.items()
        }
        return TeachersBySource(kept, SHARES)

    batch, found = collate([rows[index] for index in range(len(rows))]), []
    for first in (True, False):
        given = targets(teachers)
        given.announce([batch])
        found.append(given.of(batch))
        given.flush()
        assert given.counts() == {"targets_computed": 7 if first else 0, "targets_read": 0 if first else 7}
    for name, part in found[0].parts.items():
        again = found[1].parts[name]
        assert torch.equal(part.target.hidden_NH, again.target.hidden_NH) and torch.equal(part.places_M, again.places_M)
    assert [len(each.tokens) for each in teachers.values()] == [1, 1]


def test_answers_of_the_students_own_are_scored_by_the_teachers_of_their_source(rows, teachers):
    def prompted(row):
        return row._replace(labels=row.labels.copy() * 0 + IGNORE + (row.position_ids >= 3) * (row.labels - IGNORE))

    student = llama(12, 1, seed=3)
    loss = OnPolicyLoss(TeachersBySource(teachers, SHARES), share=1.0, writing=Writing(4, 1.0, row_tokens=32), **WEIGHTS)
    (batch,) = loss.draw(student, [collate([prompted(rows[0]), prompted(rows[1])])], step=0, seed=0)
    assert batch.sources_BT.tolist()[0] == [0] * 7 + [1] * 7
    sums = loss(student, batch)
    assert sums.tokens == {"kl_teacher": 8, "kl_law": 8}
    sums.total.backward()
    assert any(parameter.grad.any() for parameter in student.parameters())
