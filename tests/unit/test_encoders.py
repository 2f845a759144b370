"""Encoders: what a model is, which texts a packed row holds, how they are labelled and masked, and what is refused."""

import numpy as np
import pytest
import torch
from packed_rows import write_rows
from transformers import AutoConfig, AutoTokenizer

from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigError, DataError
from ray_jobs.core.models import resolve_model
from ray_jobs.corpus.packing import IGNORE, packed_row
from ray_jobs.corpus.plain_texts import NO_CLASS, PlainTexts
from ray_jobs.distillation.encoders.card import PIPELINE_TAGS, encoder_card
from ray_jobs.distillation.encoders.job import EncoderJob
from ray_jobs.distillation.encoders.kinds import check_teacher, natural_task
from ray_jobs.distillation.encoders.rows import MaskedRows
from ray_jobs.distillation.encoders.student import check_classes, layer_pairs
from ray_jobs.distillation.encoders.texts import block_mask, mean_pool, texts_of
from ray_jobs.distillation.model_card import Lineage
from ray_jobs.training.batches import Batch, PackedRows, Row, collate, step_batches

MASK = 7


def job(**changes):
    config = validate({"run": {"name": "a"}, "teacher": {"model": "minilm-l6"}, "distill": {"task": "embedding", "embedding_weight": 1.0}})
    student = config.student.model_dump() | {"layers": 3} | changes.pop("student", {})
    return EncoderJob.of(teacher="minilm-l6", student=student, distill=config.distill.model_dump() | changes, seed=0)


@pytest.fixture
def batch():
    """Two rows: texts of 3 and 2 tokens that count, one of 3 that does not; a text of 4, then padding."""
    labels = [[IGNORE, IGNORE, 0, IGNORE, 0, IGNORE, IGNORE, IGNORE], [IGNORE, 5, IGNORE, 6]]
    lengths = [[3, 2, 3], [4]]
    rows = [
        Row(np.arange(sum(each)), np.concatenate([np.arange(n) for n in each]), np.array(label))
        for each, label in zip(lengths, labels, strict=True)
    ]
    return collate(rows)


def test_texts_that_count_are_found_with_their_tokens(batch):
    texts = texts_of(batch)
    assert texts.first_S.tolist() == [0, 3, 8]
    assert texts.token_K.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    assert texts.owner_K.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert texts.num_valid_S.tolist() == [1, 1, 2]
    assert len(texts.valid_N) == batch.num_valid == 4
    assert float(texts.token_shares().sum()) == pytest.approx(4)
    hidden = torch.arange(16.0).view(2, 8, 1)
    assert mean_pool(hidden, texts)[:, 0].tolist() == [1.0, 3.5, 9.5]
    mask = block_mask(batch.position_ids_BT)[:, 0]
    assert mask.sum((1, 2)).tolist() == [9 + 4 + 9, 16 + 16]


def test_a_batch_that_counts_nothing_has_no_texts():
    ids = torch.arange(4)[None]
    texts = texts_of(Batch(ids, ids, torch.full_like(ids, IGNORE)))
    assert len(texts.first_S) == len(texts.token_K) == len(texts.valid_N) == 0


@pytest.fixture
def masked(tmp_path):
    folder = write_rows(tmp_path / "rows", [(40,), (30, 10), (20,)])
    return lambda seed=0: MaskedRows(folder, mask_id=MASK, vocab_size=100, seed=seed)


def test_masks_are_a_function_of_seed_epoch_and_row(masked):
    plain = PackedRows(masked().folder)[1]
    drawn = masked().drawn(1, epoch=2)
    for name in ("input_ids", "labels"):
        assert np.array_equal(getattr(drawn, name), getattr(masked().drawn(1, epoch=2), name))
        assert not np.array_equal(getattr(drawn, name), getattr(masked().drawn(1, epoch=3), name))
        assert not np.array_equal(getattr(drawn, name), getattr(masked(seed=1).drawn(1, epoch=2), name))
    hidden = drawn.labels != IGNORE
    assert hidden.sum() == round(0.15 * (plain.labels != IGNORE).sum())
    assert np.array_equal(drawn.labels[hidden], plain.labels[hidden])
    assert np.array_equal(drawn.input_ids[~hidden], plain.input_ids[~hidden])
    assert MASK in masked().drawn(0, epoch=0).input_ids


def test_each_epoch_masks_anew_whatever_the_number_of_workers(masked):
    def seen(world_size, step):
        parts = [
            step_batches(masked(), step=step, seed=0, global_batch_size=3, micro_batch_size=1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return sorted(tuple(row) for part in parts for each in part for row in each.input_ids_BT.tolist() if each.num_valid)

    assert seen(1, 0) == seen(3, 0) == seen(2, 0)
    assert seen(1, 0) != seen(1, 1)


@pytest.fixture(scope="module")
def minilm():
    return resolve_model("minilm-l6")


def test_texts_lie_between_special_tokens_and_are_labelled_as_the_task_needs(minilm):
    for task, inner, last in (("masked_language_model", None, IGNORE), ("embedding", IGNORE, 0), ("classification", IGNORE, NO_CLASS)):
        row = packed_row(["a"], [PlainTexts(minilm, task=task, max_length=32).encode_pair("What is an inode?", "A record of a file.")])
        ids, labels = row["input_ids"], row["labels"]
        first, second = row["segment_lengths"]
        assert first + second == len(ids) == len(labels)
        assert ids[0] == ids[first] == 101 and ids[first - 1] == ids[-1] == 102
        assert labels[0] == labels[first] == IGNORE and labels[first - 1] == labels[-1] == last
        assert labels[1:3] == (ids[1:3] if inner is None else [inner] * 2)


def test_long_texts_are_cut_to_the_row_and_labels_are_the_teachers_classes(minilm):
    texts = PlainTexts(minilm, task="classification", max_length=16)
    encoded = texts.encode_pair("why " * 50, "because " * 50)
    assert encoded.segment_lengths == [8, 8] and len(encoded.input_ids) == 16
    assert texts.encode_text("a text", label="LABEL_1").labels[-1] == texts.encode_text("a text", label="1").labels[-1] == 1
    with pytest.raises(DataError, match=r"label 'spam' is no class of the teacher, which knows LABEL_0 \(0\), LABEL_1 \(1\)"):
        texts.encode_text("a text", label="spam")


def test_what_a_model_is_follows_from_its_config():
    for saved_as, task in (
        ("BertModel", "embedding"),
        ("BertForMaskedLM", "masked_language_model"),
        ("BertForSequenceClassification", "classification"),
    ):
        assert natural_task({"model_type": "bert", "architectures": [saved_as]}) == task
    assert natural_task({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}) == "language_model"
    assert natural_task({"model_type": "bert", "is_decoder": True}) == "language_model"


def test_the_wrong_task_is_one_line_that_names_the_right_one(tiny_model):
    for task in ("language_model", "masked_language_model", "classification"):
        with pytest.raises(
            ConfigError, match=r"teacher\.model = 'minilm-l6' is an encoder \(BertModel\).*set distill\.task = \"embedding\""
        ):
            check_teacher("minilm-l6", task)
    check_teacher("minilm-l6", "embedding")
    with pytest.raises(ConfigError, match=r'is a decoder \(LlamaForCausalLM\): set distill\.task = "language_model"') as caught:
        check_teacher(str(tiny_model), "embedding")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "pool"}, 'distill.targets = "pool" is for language models'),
        ({"method": "lora"}, 'distill.method = "lora" is for language models'),
        ({"student": {"layers": 7}}, "student.layers = 7, but the teacher has 6"),
        ({"student": {"layers": [0, 6]}}, "layer 6 is out of range"),
        (
            {"hidden_weight": 1.0, "hidden_layers": [[0, 6]]},
            r"hidden_layers has \[0, 6\], but the student has layers 0 to 2 and the teacher 0 to 5",
        ),
    ],
)
def test_what_encoders_cannot_do_is_refused_before_anything_starts(changes, words):
    with pytest.raises(ConfigError, match=words):
        job(**changes).check()


def other_encoder(folder, minilm, *, added=(), **changes):
    """Return an encoder of its own with the teacher's tokenizer and further tokens; its config and tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    AutoConfig.from_pretrained(minilm, **changes).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return str(folder)


@pytest.mark.parametrize(
    ("added", "changes", "words"),
    [
        (["<another>"], {}, "another vocabulary than the teacher: token '<another>' has id 30522 in the student and None"),
        ([], {"hidden_size": 192}, "the student's have 192 numbers and the teacher's 384"),
    ],
)
def test_a_student_of_its_own_that_does_not_fit_its_teacher_is_refused(minilm, tmp_path, added, changes, words):
    with pytest.raises(ConfigError, match=words):
        job(student={"model": other_encoder(tmp_path, minilm, added=added, **changes)}).check()


def test_classifiers_of_other_classes_are_refused():
    with pytest.raises(ConfigError, match="the student has 2 classes and the teacher 3"):
        check_classes(2, 3)


FACTS = {
    "counts": {"steps": 3, "tokens": 90},
    "num_parameters": {"teacher": 4_000_000, "student": 3_000_000},
    "layers": [0, 3],
    "eval": {"kl_before": 1.5, "kl_after": 0.5, "ce_before": 2.0, "ce_after": 1.0, "ce_teacher_after": 0.75, "agreement_after": 0.9},
}
DATA = {"documents": 1, "chunks": 2, "pairs": 3, "texts": 4, "train_rows": 5, "train_tokens": 60, "eval_rows": 1}


def test_the_card_of_a_classifier_says_what_was_retained():
    distill = validate({"run": {"name": "a"}, "distill": {"task": "classification", "kd_weight": 0.8, "hidden_weight": 0.5}}).distill
    teacher = {"teacher": "/models/mine", "taught": None, "own_model": None, "start": "teacher"}
    lineage = Lineage(
        **teacher, data=DATA, distill=distill.model_dump(), versions={"torch": "2"}, pipeline_tag=PIPELINE_TAGS["classification"]
    )
    card = encoder_card(lineage, FACTS)
    for words in (
        "pipeline_tag: text-classification",
        "- Teacher: mine, as it is",
        "layers 0, 3 of the teacher",
        "1 documents (2 chunks), 3 question/answer pairs and 4 texts: 5 packed rows of 60 tokens; 1 rows held out.",
        "| forward_kl at temperature 2 | 0.8 |",
        "| cosine on hidden states (last) | 0.5 |",
        "| KL to the teacher | 1.5 | 0.5 | - |",
        "| cross-entropy | 2 | 1 | 0.75 |",
        "3000000 of 4000000 (75.0%)",
    ):
        assert words in card
    assert "/models" not in card and "sentence embeddings" not in card
    assert "nothing was measured" in encoder_card(lineage, {**FACTS, "eval": {}})


def test_layers_meet_their_own_or_the_last_or_as_listed():
    options = {"kept": [0, 2, 5], "num_student": 3, "num_teacher": 6}
    assert layer_pairs("mapped", **options) == [(0, 0), (1, 2), (2, 5)]
    assert layer_pairs("last", **options) == [(2, 5)]
    assert layer_pairs([(1, 4)], **options) == [(1, 4)]
    with pytest.raises(ConfigError, match="needs a student cut from the teacher"):
        layer_pairs("mapped", kept=None, num_student=3, num_teacher=6)


def test_an_embedding_task_without_a_loss_is_refused():
    with pytest.raises(ConfigError, match="set embedding_weight = 1"):
        validate({"run": {"name": "a"}, "distill": {"task": "embedding"}})
