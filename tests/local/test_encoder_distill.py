"""Distillation of encoders on the one training loop: against the models' own outputs, split and resumed, exported."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packed_rows import write_rows
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ray_jobs.core.errors import DataError, ModelError, TrainingFailed
from ray_jobs.core.models import resolve_model
from ray_jobs.corpus.packing import IGNORE, packed_row
from ray_jobs.corpus.plain_texts import NO_CLASS, PlainTexts
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.encoders.influence import measure_encoder_influence
from ray_jobs.distillation.encoders.load import hidden_states, load_encoder
from ray_jobs.distillation.encoders.loss import EncoderLoss, Weights
from ray_jobs.distillation.encoders.rows import MaskedRows
from ray_jobs.distillation.encoders.self_check import check_encoder_loss
from ray_jobs.distillation.encoders.student import PROJECTION, cut_student, export_encoder, prepare_student
from ray_jobs.distillation.encoders.texts import mean_pool, texts_of
from ray_jobs.judging.encoder import SentenceEncoder
from ray_jobs.training.batches import Batch, PackedRows, Row, collate
from ray_jobs.training.loop import train
from ray_jobs.training.recipe import Recipe

SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
TEXTS = ["What is an inode?", "A page table maps virtual addresses to physical ones.", "The scheduler chooses the next process."]
PAIRS = [(0, 0), (1, 3)]


@pytest.fixture
def folder_of(tmp_path):
    """A function that saves a random tiny encoder of a class, and returns its folder."""

    def make(kind, config=BertConfig, **changes):
        torch.manual_seed(0)
        model = kind(config(vocab_size=9000, pad_token_id=1, initializer_range=0.4, **SHAPE | changes))
        model.save_pretrained(tmp_path / kind.__name__)
        return tmp_path / kind.__name__

    return make


def two_texts(labels):
    ids = torch.arange(10, 24)[None]
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    return Batch(
        ids,
        positions,
        torch.full_like(ids, IGNORE).index_put((torch.tensor([0]), torch.tensor(list(labels))), torch.tensor(list(labels.values()))),
    )


def student_of(folder, task, **options):
    teacher = load_encoder(folder, task, dtype=torch.float32)
    student = prepare_student(cut_student(teacher, [0, 3], start="teacher"), task=task)
    return student, EncoderLoss(teacher, task=task, pairs=PAIRS, **options)


@pytest.mark.parametrize(("kind", "config"), [(BertForMaskedLM, BertConfig), (RobertaForMaskedLM, RobertaConfig)])
def test_masked_tokens_equal_the_models_own_logits_bias_included(folder_of, kind, config):
    folder = folder_of(kind, config)
    student, loss = student_of(folder, "masked_language_model", weights=Weights(kd=0.7, ce=0.3), divergence=Divergence(temperature=2.0))
    torch.nn.init.normal_(student.get_output_embeddings().bias)
    labels = {3: 5, 4: 6, 11: 7}
    found = loss(student, two_texts(labels))
    found.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    parts = [(slice(0, 6), [3, 4]), (slice(6, 14), [5])]
    ids = torch.arange(10, 24)[None]
    mine, theirs = (
        torch.cat([model(input_ids=ids[:, part]).logits[0, places] for part, places in parts]) for model in (student, loss.teacher)
    )
    kl = 4 * F.kl_div(F.log_softmax(mine / 2, -1), F.softmax(theirs.detach() / 2, -1), reduction="sum")
    ce = F.cross_entropy(mine, torch.tensor(list(labels.values())), reduction="sum")
    torch.testing.assert_close(found.terms, {"kl": kl.detach(), "ce": ce.detach()}, rtol=1e-4, atol=1e-4)
    (0.7 * kl + 0.3 * ce).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_classes_are_compared_for_all_texts_and_labels_count_where_there_are(folder_of):
    folder = folder_of(BertForSequenceClassification, num_labels=3)
    student, loss = student_of(folder, "classification", weights=Weights(kd=1.0, ce=0.5))
    found = loss(student, two_texts({5: 2, 13: NO_CLASS}))
    ids = torch.arange(10, 24)[None]
    mine, theirs = (torch.cat([model(input_ids=part).logits for part in (ids[:, :6], ids[:, 6:])]) for model in (student, loss.teacher))
    kl = F.kl_div(F.log_softmax(mine, -1), F.softmax(theirs, -1), reduction="sum")
    ce = F.cross_entropy(mine[:1], torch.tensor([2]))
    torch.testing.assert_close(found.terms, {"kl": kl.detach(), "ce": ce.detach()}, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.total, kl + 0.5 * ce, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_states_are_compared_on_the_tokens_of_mapped_layers(folder_of, kind):
    student, loss = student_of(folder_of(BertModel), "embedding", weights=Weights(hidden=1.0, embedding=1.0), hidden_loss=kind)
    batch = two_texts({5: 0, 13: 0})
    found = loss(student, batch)
    mine, theirs = (hidden_states(model, batch, every_layer=True) for model in (student, loss.teacher))
    total = 0.0
    for one, other in PAIRS:
        a, b = mine[one + 1][0], theirs[other + 1][0]
        distance = 1 - F.cosine_similarity(a, b) if kind == "cosine" else (a - b).square().mean(-1)
        total += (distance[:6].mean() + distance[6:].mean()) / len(PAIRS)
    torch.testing.assert_close(found.terms["hidden"], total.detach())
    pooled = [torch.stack([states[-1][0, :6].mean(0), states[-1][0, 6:].mean(0)]) for states in (mine, theirs)]
    torch.testing.assert_close(found.terms["embedding"], (1 - F.cosine_similarity(*pooled)).sum().detach())


def test_a_student_of_another_width_is_projected_and_the_projection_is_not_exported(folder_of, tmp_path):
    narrow = tmp_path / "narrow"
    BertModel(BertConfig(vocab_size=9000, **SHAPE | {"hidden_size": 8, "num_hidden_layers": 2})).save_pretrained(narrow)
    teacher = load_encoder(folder_of(BertModel), "embedding", dtype=torch.float32)
    student = prepare_student(load_encoder(narrow, "embedding", dtype=torch.float32), task="embedding", teacher_width=16)
    loss = EncoderLoss(teacher, task="embedding", weights=Weights(hidden=1.0), pairs=[(1, 3)])
    loss(student, two_texts({5: 0})).total.backward()
    assert getattr(student, PROJECTION).weight.grad.abs().sum() > 0
    export_encoder(student, tmp_path / "out", teacher_folder=resolve_model("minilm-l6"), task="embedding")
    assert not [name for name in load_encoder(tmp_path / "out", "embedding", dtype=torch.float32).state_dict() if "projection" in name]


@pytest.fixture
def masked(tmp_path):
    folder = write_rows(tmp_path / "rows", [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13)])
    return MaskedRows(folder, mask_id=3, vocab_size=6000, seed=0)


def teach(folder, rows, **options):
    student, loss = student_of(folder, "masked_language_model", weights=Weights(kd=1.0, ce=0.1, hidden=1.0))
    changes = {name: options.pop(name) for name in ("max_steps", "micro_batch_size") if name in options}
    recipe = Recipe(
        **{"max_steps": 4, "checkpoint_every_steps": 2, "learning_rate": 3e-3, "global_batch_size": 4, "dtype": "float32"} | changes
    )
    return student, train(student, loss, rows, eval_rows=rows, recipe=recipe, **options)


def test_the_student_learns_and_splitting_a_step_changes_nothing(folder_of, masked):
    folder = folder_of(BertForMaskedLM)
    whole, progress = teach(folder, masked, micro_batch_size=4, max_steps=8)
    split, _ = teach(folder, masked, micro_batch_size=1, max_steps=8)
    assert progress.eval_after["terms"]["kl"] < 0.8 * progress.eval_before["terms"]["kl"]
    others = dict(split.named_parameters())
    for name, one in whole.named_parameters():
        if "key.bias" not in name:  # it shifts all scores of a query alike: its gradient is rounding, which Adam blows up
            torch.testing.assert_close(one, others[name], rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_a_resumed_run_masks_and_learns_as_an_undisturbed_one(folder_of, masked, tmp_path):
    folder, saved = folder_of(BertForMaskedLM), tmp_path / "checkpoint"

    def keep(step, save):
        if step == 2:
            saved.mkdir()
            save(saved)

    straight, _ = teach(folder, masked, on_checkpoint=keep)
    resumed, _ = teach(folder, masked, resume_from=saved)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class MeanOfMeans(EncoderLoss):
    """Wrong as others were: each micro-batch is meaned by itself."""

    def between(self, student, teacher, texts):
        sums = super().between(student, teacher, texts)
        return sums._replace(total=sums.total / len(texts.valid_N))


class TextsSeeEachOther(EncoderLoss):
    """Wrong as packing without a mask of blocks is: a text reads those beside it."""

    def states(self, model, batch):
        positions_BT = torch.arange(batch.position_ids_BT.shape[1]).expand_as(batch.position_ids_BT)
        return super().states(model, Batch(batch.input_ids_BT, positions_BT, batch.labels_BT))


class FirstTokenLate(EncoderLoss):
    """Wrong by one: a classifier reads the token after the first, a masked token is told from the one before."""

    def between(self, student, teacher, texts):
        return super().between(student, teacher, texts._replace(first_S=texts.first_S + 1, valid_N=texts.valid_N - 1))


KINDS = {"masked_language_model": BertForMaskedLM, "embedding": BertModel, "classification": BertForSequenceClassification}
WEIGHTS = Weights(kd=0.7, ce=0.3, hidden=1.0, embedding=1.0)


def two_rows(task):
    both = two_texts({3: 5, 5: 1, 13: 2} if task == "masked_language_model" else {5: 1, 13: 0})
    row = Row(*(each[0].numpy() for each in (both.input_ids_BT, both.position_ids_BT, both.labels_BT)))
    return [row, row.cut(slice(6))]


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        ("embedding", MeanOfMeans),
        ("embedding", TextsSeeEachOther),
        ("masked_language_model", TextsSeeEachOther),
        ("masked_language_model", FirstTokenLate),
        ("classification", FirstTokenLate),
    ],
)
def test_a_wrong_loss_is_found_before_the_first_step(folder_of, task, wrong):
    teacher = load_encoder(folder_of(KINDS[task]), task, dtype=torch.float32)
    student = prepare_student(cut_student(teacher, [0, 3], start="teacher"), task=task)
    loss = wrong(teacher, task=task, weights=WEIGHTS, pairs=PAIRS)
    with pytest.raises(TrainingFailed, match=r"self-check of the loss: .* differ .* loss .* against .*, gradients apart by"):
        check_encoder_loss(loss, student, two_rows(task), torch.float32)


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_losses_pass_and_leave_the_student_as_it_was(folder_of, task, dtype):
    folder = folder_of(KINDS[task])
    teacher = load_encoder(folder, task, dtype=dtype)
    for layers in ([0, 3], [0, 1, 2, 3]):  # the last equals its teacher, so that all real gaps are 0
        student = prepare_student(cut_student(teacher, layers, start="teacher"), task=task).train()
        loss = EncoderLoss(teacher, task=task, weights=WEIGHTS, divergence=Divergence("jsd"), pairs=list(enumerate(layers)))
        check_encoder_loss(loss, student, two_rows(task), dtype)
        assert student.training and all(parameter.grad is None for parameter in student.parameters())


def test_a_loss_that_is_no_number_ends_with_the_step_and_its_rows(folder_of, masked):
    student, loss = student_of(folder_of(BertForMaskedLM), "masked_language_model", weights=WEIGHTS)
    recipe = Recipe(max_steps=3, learning_rate=1e38, global_batch_size=2, micro_batch_size=1, dtype="float32")
    with pytest.raises(TrainingFailed, match=r"the loss is (nan|inf) at step 2, from packed rows \[\d+, \d+\]: lower learning_rate"):
        train(student, loss, masked, eval_rows=None, recipe=recipe)


def test_rows_in_which_no_text_counts_are_refused(folder_of, tmp_path):
    rows = PackedRows(write_rows(tmp_path / "empty", [(1, 1, 1), (1, 1)]))
    student, loss = student_of(folder_of(BertModel), "embedding", weights=Weights(embedding=1.0))
    with pytest.raises(DataError, match=r"no token of step 1 has a label: its packed rows \[0, 1\] teach nothing"):
        train(student, loss, rows, eval_rows=None, recipe=Recipe(max_steps=1, global_batch_size=2, dtype="float32"))


def test_the_layer_that_changes_nothing_has_no_influence(folder_of, masked):
    teacher = load_encoder(folder_of(BertModel), "embedding", dtype=torch.float32)
    idle = teacher.encoder.layer[2]
    for output in (idle.attention.output, idle.output):  # post-norm layers: what comes in is normalised already
        torch.nn.init.zeros_(output.dense.weight)
    rows = PackedRows(masked.folder)
    found = measure_encoder_influence(teacher, rows, seed=0)
    assert min(range(4), key=found["influence"].__getitem__) == 2
    assert found["influence"][2] == pytest.approx(0, abs=1e-3)
    assert (found["rows"], found["positions"]) == (6, sum(len(rows[i].input_ids) for i in range(6)))
    assert measure_encoder_influence(teacher, rows, seed=0, micro_batch_size=5)["influence"] == pytest.approx(found["influence"], abs=1e-6)


@pytest.fixture(scope="module")
def minilm():
    return resolve_model("minilm-l6")


def test_a_masked_token_head_without_weights_is_refused(minilm):
    with pytest.raises(ModelError, match=r'has no weights for cls\.predictions.*set distill\.task = "embedding"'):
        load_encoder(minilm, "masked_language_model", dtype=torch.float32)


def test_minilm_in_a_packed_row_embeds_as_alone_and_its_student_is_a_plain_folder(minilm, tmp_path):
    teacher = load_encoder(minilm, "embedding", dtype=torch.float32)
    texts = PlainTexts(minilm, task="embedding", max_length=64)
    packed = packed_row(["a"], [texts.encode_text(text) for text in TEXTS])
    positions = np.concatenate([np.arange(length) for length in packed["segment_lengths"]])
    batch = collate([Row(np.array(packed["input_ids"]), positions, np.array(packed["labels"]))])

    def embedded(model):
        with torch.no_grad():
            return F.normalize(mean_pool(hidden_states(model, batch)[0], texts_of(batch)), dim=-1).numpy()

    np.testing.assert_allclose(embedded(teacher), SentenceEncoder(minilm)(TEXTS), atol=1e-5)
    student = prepare_student(cut_student(teacher, [0, 2, 5], start="teacher"), task="embedding")
    out = tmp_path / "student"
    export_encoder(student, out, teacher_folder=minilm, task="embedding")
    assert (out / "modules.json").exists() and (out / "1_Pooling" / "config.json").exists()
    code = (
        "import sys; from transformers import AutoModel, AutoTokenizer; folder = sys.argv[1]\n"
        "model, info = AutoModel.from_pretrained(folder, output_loading_info=True)\n"
        "ids = AutoTokenizer.from_pretrained(folder)('a').input_ids\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "assert 'ray_jobs' not in sys.modules; print(model.config.num_hidden_layers, len(ids))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["3", "3"]
    np.testing.assert_allclose(SentenceEncoder(out)(TEXTS), embedded(student.eval()), atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).model_max_length == AutoTokenizer.from_pretrained(minilm).model_max_length
