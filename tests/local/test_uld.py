"""Universal logit distillation: two real tokenizers on one text, the distance against a dense reference, and a loss that falls."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ray_jobs.core.models import resolve_model
from ray_jobs.corpus.packing import packed_row
from ray_jobs.corpus.template import ChatTemplate
from ray_jobs.distillation.making import Student
from ray_jobs.distillation.retokenize import Retokenizer
from ray_jobs.distillation.start import Start
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.distillation.uld import UldLoss, sorted_distance
from ray_jobs.training.batches import IGNORE, Row, collate
from ray_jobs.training.models import load_model, load_tokenizer

PAIRS = [
    ("What does the kernel keep?", "It keeps the page table, and answers interrupts in order."),
    ("Wozu dient der Prozessor?", "Er führt Befehle aus – über 3 Mrd. je Sekunde \U0001f600."),
]


@pytest.fixture(scope="module")
def tokenizers(smollm2):
    """The embedded model's tokenizer, MiniLM's WordPiece, and a small byte-level BPE with marks of its own."""
    small = Tokenizer(models.BPE())
    small.pre_tokenizer, small.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    small.train_from_iterator([text for pair in PAIRS for text in pair], trainer)
    bpe = PreTrainedTokenizerFast(tokenizer_object=small, bos_token="<s>", eos_token="</s>")
    return {"teacher": load_tokenizer(smollm2), "wordpiece": load_tokenizer(resolve_model("minilm-l6")), "bpe": bpe}


def batch_of(smollm2, pairs=PAIRS):
    template = ChatTemplate(smollm2)
    rows = [packed_row(["a"], [template.encode_pair(*pair) for pair in pairs]), packed_row(["b"], [template.encode_text(pairs[0][1])])]
    return collate([Row(r["input_ids"], [i for n in r["segment_lengths"] for i in range(n)], r["labels"]) for r in rows])


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_aligned_places_have_read_the_same_text_and_the_same_part_is_learnt(tokenizers, smollm2, kind):
    teacher, student = tokenizers["teacher"], tokenizers[kind]
    retokenizer = Retokenizer(teacher, student, max_length=512)
    for question, answer in PAIRS:
        encoded = ChatTemplate(smollm2).encode_pair(question, answer)
        ids = tuple(encoded.input_ids)
        made = retokenizer.segment(ids, encoded.num_untrained)
        ends = student.eos_token_id is not None
        text = teacher.decode(ids[:-1] if ends else ids)
        spans = student(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        assert len(made.pairs) > 5
        for i, j in made.pairs:
            assert teacher.decode(ids[: i + 1]) == text[: spans[j][1]]
            assert i + 1 >= encoded.num_untrained
            assert made.labels[j + 1] != IGNORE
        learnt = [place for place, label in enumerate(made.labels) if label != IGNORE]
        last = len(made.labels) - ends
        assert learnt == list(range(learnt[0], len(made.labels)))
        assert text[spans[learnt[0]][0] : spans[last - 1][1]].strip() == answer + ("" if ends else "<|im_end|>")
        assert (made.labels[-1] == student.eos_token_id) == ends


def test_places_of_a_batch_point_at_each_models_own_valid_positions(tokenizers, smollm2):
    batch = batch_of(smollm2)
    own, teacher_at, student_at = Retokenizer(tokenizers["teacher"], tokenizers["bpe"], max_length=512)(batch)
    assert len(teacher_at) == len(student_at) > 10
    assert max(teacher_at) < batch.num_valid
    assert max(student_at) < own.num_valid
    theirs, mine = (b.input_ids_BT[:, :-1][b.labels_BT[:, 1:] != IGNORE] for b in (batch, own))
    for i, j in zip(theirs[teacher_at], mine[student_at], strict=True):
        read, own_read = tokenizers["teacher"].decode([i]), tokenizers["bpe"].decode([j])
        assert read.endswith(own_read) or own_read.endswith(read) or "\ufffd" in read + own_read
    nothing = Retokenizer(tokenizers["teacher"], tokenizers["bpe"], max_length=512)(
        type(batch)(batch.input_ids_BT, batch.position_ids_BT, torch.full_like(batch.labels_BT, IGNORE))
    )
    assert nothing.batch.num_valid == len(nothing.teacher_at_M) == 0


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(11, 17), (17, 11), (13, 13)])
def test_distance_and_gradient_equal_the_dense_reference(student_rows, teacher_rows):
    torch.manual_seed(0)
    hidden, teacher = torch.randn(300, 5, dtype=torch.float64, requires_grad=True), torch.randn(300, 7, dtype=torch.float64)
    head = torch.randn(student_rows, 5, dtype=torch.float64, requires_grad=True)
    teacher_head = torch.randn(teacher_rows, 7, dtype=torch.float64)
    found = sorted_distance(hidden, head, teacher, teacher_head, temperature=2.0)
    found.backward()
    got = [hidden.grad.clone(), head.grad.clone()]
    hidden.grad = head.grad = None
    width = max(student_rows, teacher_rows)
    sorted_q, sorted_p = (
        nn.functional.pad(torch.softmax(h @ w.T / 2, -1).sort(-1, descending=True).values, (0, width - len(w)))
        for h, w in ((hidden, head), (teacher, teacher_head))
    )
    dense = 2 * (sorted_q - sorted_p).abs().sum()
    dense.backward()
    torch.testing.assert_close(found, dense)
    torch.testing.assert_close(got, [hidden.grad, head.grad])
    with torch.no_grad():
        assert sorted_distance(teacher, teacher_head, teacher, teacher_head, temperature=1.0) == 0


def test_the_loss_falls_for_a_student_with_another_tokenizer(tokenizers, tiny_model, smollm2):
    torch.manual_seed(0)
    teacher = WorkerTeacher(load_model(tiny_model, dtype=torch.float32))
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30522, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        )
    )
    retokenizer = Retokenizer(tokenizers["teacher"], tokenizers["wordpiece"], max_length=512)
    loss = UldLoss(teacher, retokenizer, kd_temperature=1.0, kd_weight=1.0, ce_weight=0.1)
    optimizer, batch, seen = torch.optim.AdamW(student.parameters(), lr=2e-2), batch_of(smollm2), []
    for _ in range(6):
        sums = loss(student, batch)
        optimizer.zero_grad()
        sums.total.backward()
        optimizer.step()
        seen.append(sums)
    assert all(later.terms["ce"] < earlier.terms["ce"] for earlier, later in itertools.pairwise(seen))
    torch.testing.assert_close(seen[0].total, seen[0].terms["uld"] + 0.1 * seen[0].terms["ce"])
    assert seen[-1].total < 0.9 * seen[0].total


def test_the_exported_student_speaks_the_template_it_was_trained_on(tokenizers, smollm2, tmp_path):
    own, bpe = tmp_path / "own", tokenizers["bpe"]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(bpe), **shape)).save_pretrained(own)
    bpe.save_pretrained(own)
    made = Student(Start(str(own)), tokenizer=str(own), dtype="float32", chat_template=tokenizers["teacher"].chat_template)
    made.write(made.load("cpu"), tmp_path / "student", device="cpu")
    written = AutoTokenizer.from_pretrained(tmp_path / "student")
    question, answer = PAIRS[0]
    encoded = ChatTemplate(smollm2).encode_pair(question, answer)
    trained = Retokenizer(tokenizers["teacher"], bpe, max_length=512).segment(tuple(encoded.input_ids), encoded.num_untrained)
    asked = written.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True)["input_ids"]
    num_asked = sum(label == IGNORE for label in trained.labels)
    assert tuple(asked) == trained.input_ids[:num_asked]
    assert load_model(tmp_path / "student", dtype=torch.float32).generation_config.eos_token_id == bpe.eos_token_id
