"""The exported student's card: what the hub reads, what people read, and nothing of the machine."""

import math

import pytest
from huggingface_hub import ModelCard

from ray_jobs.core.config import DistillSection
from ray_jobs.distillation.model_card import Lineage, model_card, public_name

DATA = {"documents": 3, "chunks": 40, "pairs": 24, "train_rows": 9, "train_tokens": 4321, "eval_rows": 2}
LINEAGE = Lineage(
    teacher="meta-llama/Llama-2-7b-hf",
    taught="qlora",
    own_model=None,
    start="teacher",
    data=DATA,
    distill=DistillSection(preset="distilbert").model_dump(),
    versions={"raystill": "0.1", "torch": "2.13"},
)
FACTS = {
    "counts": {"steps": 30, "tokens": 5000},
    "num_parameters": {"teacher": 4_000_000, "student": 2_500_000},
    "layers": (0, 2, 3),
    "eval": {"kl_before_nats": 1.5, "kl_after_nats": 0.25, "ce_before_nats": 4.0, "ce_after_nats": 3.0, "ce_teacher_nats": 2.0},
}


def test_the_hub_reads_the_front_matter():
    data = ModelCard(model_card(LINEAGE, FACTS)).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", "meta-llama/Llama-2-7b-hf")
    assert data.tags == ["knowledge-distillation"]


def test_people_read_teacher_data_losses_layers_and_what_was_retained():
    card = model_card(LINEAGE, FACTS)
    for words in (
        "layers 0, 2, 3 of the teacher",
        "an adapter trained on quantized weights",
        "3 documents (40 chunks) and 24 question/answer pairs: 9 packed rows of 4321 tokens; 2 rows held out",
        "| forward_kl at temperature 2 | 5 |",
        "| cross-entropy on the labels | 2 |",
        "| cosine on hidden states (last) | 1 |",
        "30 steps over 5000 tokens",
        "| KL to the teacher, nats a token | 1.5 | 0.25 | 0 |",
        f"| perplexity | {math.exp(4):.4g} | {math.exp(3):.4g} | {math.exp(2):.4g} |",
        "2500000 of 4000000 (62.5%)",
        "torch 2.13",
    ):
        assert words in card
    assert "sentence embeddings" not in card


def test_who_wrote_the_answers_is_the_teacher():
    distill = DistillSection(targets="text", text={"model": "gpt-4o", "base_url": "https://x.example"}).model_dump()
    card = model_card(LINEAGE._replace(distill=distill, data=DATA | {"answers": 24, "failed": 1}), FACTS)
    assert "# A student of gpt-4o\n" in card
    assert "taught by the answers of gpt-4o" in card
    assert "- Teacher: gpt-4o, by the answers it wrote" in card
    assert "24 answers by gpt-4o to the questions of 3 documents (40 chunks) and 24 question/answer pairs, 1 of them not trained on" in card
    assert "- Teacher: meta-llama" not in card


def test_without_held_out_rows_the_card_says_that_nothing_was_measured():
    card = model_card(LINEAGE, {**FACTS, "eval": dict.fromkeys(FACTS["eval"])})
    assert "nothing was measured" in card
    assert "62.5%" in card


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("/home/me/models/mine", "mine"),
        ("~/models/mine/", "mine"),
        ("s3://bucket/key/mine", "mine"),
        ("models/mine.gguf", "mine.gguf"),
    ],
)
def test_no_path_or_store_is_told(name, shown):
    assert public_name(name) == shown
    card = model_card(LINEAGE._replace(own_model=name), FACTS)
    assert f"- Student: {shown}, from its own weights" in card
    assert name == shown or name not in card


def test_several_teachers_are_named_with_what_they_taught():
    teachers = {
        "teacher": {"model": "x", "sources": ["/home/me/course/a.md"], "weight": 1.0, "kl_before_nats": 2.0, "kl_after_nats": 0.5},
        "law": {"model": "/home/me/law-7b", "sources": ["laws.jsonl"], "weight": 2.5, "kl_before_nats": 1.0, "kl_after_nats": 0.25},
    }
    card = model_card(LINEAGE, {**FACTS, "teachers": teachers})
    for words in (
        "(with an adapter trained on quantized weights); taught a.md, with weight 1\n",
        "\n- Teacher law: law-7b; taught laws.jsonl, with weight 2.5\n- Student",
        "| KL to the teachers by their shares, nats a token | 1.5 | 0.25 | 0 |",
        "| KL to teacher law, on what it taught | 1 | 0.25 | 0 |",
    ):
        assert words in card
    assert "/home/me" not in card
