"""Encoders: what a model is, which texts a packed row holds, how they are labelled and masked, and what is refused."""

import numpy as np
import pytest
import torch
from packed_rows import write_rows

from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigError, DataError
from ray_jobs.core.models import resolve_model
from ray_jobs.corpus.packing import IGNORE, packed_row
from ray_jobs.corpus.plain_texts import NO_CLASS, PlainTexts
from ray_jobs.distillation.encoders.job import EncoderJob
from ray_jobs.distillation.encoders.kinds import check_teacher, natural_task
from ray_jobs.distillation.encoders.rows import MaskedRows
from ray_jobs.distillation.encoders.student import layer_pairs
from ray_jobs.distillation.encoders.texts import block_mask, mean_pool, texts_of
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
        ({"student": {"choose": "influence"}}, r"list the layers, like student.layers = \[0, 2, 5\]"),
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
