"""The cache around a teacher: what is computed once, what a run with it gives, and when the teacher is in memory."""

import math
import re
import shutil

import pytest
import torch
from packed_rows import write_rows

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.cache import CachedTargets, KeptHidden, KeptTopK
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.head import read_head
from ray_jobs.distillation.identity import row_keys, teacher_identity
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.shards import ShardStore
from ray_jobs.distillation.student import build_student
from ray_jobs.distillation.targets import LazyTeacher, WorkerTeacher
from ray_jobs.distillation.topk import TopKCodec, make_top_k
from ray_jobs.training.batches import IGNORE, Batch, PackedRows, collate
from ray_jobs.training.loop import train
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13), (10,), (6, 10)]
EXACT = KeptHidden(64, torch.float32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return PackedRows(write_rows(tmp_path_factory.mktemp("rows"), SEGMENTS))


@pytest.fixture
def lazy(tiny_model):
    """A teacher that remembers the rows it was asked for and how often it was loaded."""

    class Watched(LazyTeacher):
        asked, loaded = 0, 0

        def of(self, batch):
            self.asked += len(batch.input_ids_BT)
            return super().of(batch)

    def load():
        teacher.loaded += 1
        return load_model(tiny_model, dtype=torch.float32)

    teacher = Watched(load, lambda: read_head(tiny_model, None, dtype=torch.float32, device="cpu", load=load))
    return teacher


def cached(inner, folder, *, kept=EXACT, kind="hidden"):
    store = ShardStore(Storage(str(folder)), kind=kind, budget_bytes=2**30)
    return CachedTargets(inner, store, identity="teacher", kept=kept, epoch_rows=len(SEGMENTS))


def distil(tiny_model, rows, targets, *, steps=4):
    torch.manual_seed(0)
    student = build_student(load_model(tiny_model, dtype=torch.float32), [0, 3])
    recipe = Recipe(max_steps=steps, learning_rate=3e-3, global_batch_size=4, micro_batch_size=2, dtype="float32")
    progress = train(student, DistillLoss(targets, **OPTIONS), rows, eval_rows=rows, recipe=recipe)
    return student.state_dict(), progress


OPTIONS = {"divergence": Divergence(temperature=2.0), "kd_weight": 0.9, "ce_weight": 0.1}


def assert_equal(weights, others):
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def test_a_kept_target_changes_no_weight_and_the_second_run_needs_no_teacher(tiny_model, rows, lazy, tmp_path):
    plain, _ = distil(tiny_model, rows, lazy)
    asked_without = lazy.asked
    lazy.release()
    lazy.asked = lazy.loaded = 0
    first, progress = distil(tiny_model, rows, cached(lazy, tmp_path))
    assert_equal(first, plain)
    assert lazy.asked == len(SEGMENTS) < asked_without, "evaluation computes each row once, training none"
    counts = [line["counts"] for line in progress.log if "loss" in line]
    assert sum(each["targets_computed"] for each in counts) == len(SEGMENTS)
    assert sum(each["targets_read"] for each in counts) == 4 * 4
    assert all(each["wait_teacher_s"] >= 0 for each in counts)
    assert not lazy.is_loaded, "released after an epoch of rows that were read"
    lazy.asked = lazy.loaded = 0
    targets = cached(lazy, tmp_path)
    second, _ = distil(tiny_model, rows, targets)
    assert_equal(second, first)
    assert (lazy.asked, lazy.loaded) == (0, 0)
    assert targets.facts()["bytes_per_token"] == 64 * 4


@pytest.mark.parametrize(("name", "kept"), {"hidden": KeptHidden(64, torch.bfloat16), "top_k": KeptTopK(TopKCodec(32, 49152))}.items())
def test_what_was_just_computed_is_what_would_be_read(rows, lazy, tmp_path, name, kept):
    batch = collate([rows[0], rows[1]])
    first = cached(lazy, tmp_path, kept=kept, kind=name)
    computed = first.of(batch)
    first.flush()
    read = cached(lazy, tmp_path, kept=kept, kind=name).of(batch)
    torch.testing.assert_close(tuple(computed), tuple(read), rtol=0, atol=0)
    assert lazy.asked == 2
    if name == "top_k":
        exact, labels = lazy.of(batch), batch.labels_BT[:, 1:][batch.labels_BT[:, 1:] != IGNORE]
        whole = make_top_k(exact.hidden_NH, exact.head_VH, labels, k=32)
        torch.testing.assert_close(read.log_p_NK, whole.log_p_NK, atol=1e-3, rtol=0)
        assert torch.equal(read.token_ids_NK, whole.token_ids_NK)


class Broken(WorkerTeacher):
    """A teacher with one number in its last states that is not as it should be."""

    number = math.nan

    def of(self, batch):
        target = super().of(batch)
        target.hidden_NH[-1, 3] = self.number
        return target


@pytest.mark.parametrize(
    ("number", "kept"),
    [(math.nan, EXACT), (math.inf, EXACT), (1e6, KeptHidden(64, torch.float16)), (math.nan, KeptTopK(TopKCodec(32, 49152)))],
)
def test_targets_that_are_not_finite_are_refused_where_they_are_computed_and_not_kept(tiny_model, rows, tmp_path, number, kept):
    teacher = Broken(load_model(tiny_model, dtype=torch.float32))
    teacher.number = number
    targets = cached(teacher, tmp_path, kept=kept)
    begins = re.escape(str(rows[1].input_ids[:8].tolist()))
    message = rf"targets of the teacher are NaN or .* at 1 of 2 rows .*row 1 begins {begins}.* is kept\. Use distill\.dtype = \"float32\""
    with pytest.raises(TrainingFailed, match=message):
        targets.of(collate([rows[0], rows[1]]))
    assert targets.facts()["cached_bytes"] == 0


def test_a_damaged_shard_is_computed_again_with_an_equal_result(tiny_model, rows, lazy, tmp_path):
    first, _ = distil(tiny_model, rows, cached(lazy, tmp_path), steps=2)
    (shard,) = tmp_path.iterdir()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    lazy.asked = 0
    assert_equal(distil(tiny_model, rows, cached(lazy, tmp_path), steps=2)[0], first)
    assert 0 < lazy.asked <= len(SEGMENTS)


def test_rows_ahead_are_asked_for_once_and_read_before_they_are_needed(rows, lazy, tmp_path):
    targets = cached(lazy, tmp_path)
    batches = [collate([rows[0], rows[1]]), collate([rows[1], rows[2]]), collate([rows[0]])]
    targets.announce(batches)
    for batch in batches:
        torch.testing.assert_close(targets.of(batch).hidden_NH, lazy.of(batch).hidden_NH, rtol=1e-5, atol=1e-5)
    assert targets.counts() == {"targets_computed": 3, "targets_read": 2}


def test_keys_know_tokens_labels_and_starts_but_no_padding(rows):
    short, long = rows[1], rows[3]
    assert row_keys("t", collate([short, long]))[0] == row_keys("t", collate([short]))[0]
    batch = collate([short])
    keys = {row_keys("t", batch)[0], row_keys("u", batch)[0]}
    for name in ("input_ids_BT", "position_ids_BT", "labels_BT"):
        changed = {each: getattr(batch, each).clone() for each in ("input_ids_BT", "position_ids_BT", "labels_BT")}
        changed[name][0, 3] += 1
        keys.add(row_keys("t", Batch(**changed))[0])
    assert len(keys) == 5
    nothing = Batch(batch.input_ids_BT, batch.position_ids_BT, torch.full_like(batch.labels_BT, IGNORE))
    assert row_keys("t", nothing) == [None]


def test_no_teacher_is_started_to_be_checked_where_all_was_read(tiny_model, rows, tmp_path):
    class Probed(WorkerTeacher):
        """As a pool, which would start an actor for whatever it is asked."""

        probes = 0

        def probe(self, batch):
            self.probes += 1
            return super().probe(batch)

    batch, probes = collate([rows[1]]), []
    for _ in range(2):
        teacher = Probed(load_model(tiny_model, dtype=torch.float32))
        loss = DistillLoss(cached(teacher, tmp_path), **OPTIONS)
        loss.ask(batch)
        loss.ask(batch)
        loss.flush()
        probes.append(teacher.probes)
    assert probes == [1, 0], "once with the first row that is computed, and never where all is read"


def test_rows_that_count_nothing_ask_nobody(rows, lazy, tmp_path):
    batch = collate([rows[0]])
    nothing = Batch(batch.input_ids_BT, batch.position_ids_BT, torch.full_like(batch.labels_BT, IGNORE))
    assert cached(lazy, tmp_path).of(nothing).hidden_NH.shape == (0, 64)
    assert not lazy.is_loaded


def test_a_teacher_is_another_with_any_of_its_weights(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    name = teacher_identity(tiny_model, dtype="float32")
    assert teacher_identity(copy, dtype="float32") == name
    assert len({name, teacher_identity(copy, dtype="bfloat16"), teacher_identity(copy, quantization="nf4", dtype="float32")}) == 3
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert teacher_identity(copy, dtype="float32") != name


def test_the_head_alone_is_that_of_the_model(tiny_model, tmp_path):
    def refuse():
        raise AssertionError("the body was loaded")

    model = load_model(tiny_model, dtype=torch.bfloat16)
    head = read_head(tiny_model, None, dtype=torch.bfloat16, device="cpu", load=refuse)
    assert torch.equal(head, model.get_output_embeddings().weight)
