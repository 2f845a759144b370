"""The memory plan of encoders: what a step of their shapes holds, and what is said of a worker that is too small."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from ray_jobs import distill_encoder, plan
from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigError
from ray_jobs.corpus.packing import IGNORE
from ray_jobs.distillation.encoders.loss import EncoderLoss, Weights
from ray_jobs.distillation.encoders.plan import EncoderRequest, predict_encoder
from ray_jobs.distillation.encoders.student import cut_student, prepare_student
from ray_jobs.training.activations import Alive, forget
from ray_jobs.training.batches import Batch
from ray_jobs.training.memory_plan import Work

SHAPE = {"vocab_size": 2000, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = {"masked_language_model": BertForMaskedLM, "embedding": BertModel, "classification": BertForSequenceClassification}
WEIGHTS = Weights(kd=0.7, ce=0.3, hidden=1.0, embedding=1.0)
PAIRS = [(0, 0), (1, 3)]


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_counts_what_a_real_step_holds(task, checkpointing):
    torch.manual_seed(0)
    teacher = KINDS[task](BertConfig(**SHAPE)).eval()
    student = prepare_student(cut_student(teacher, [0, 3], start="teacher"), task=task)
    loss = EncoderLoss(teacher, task=task, weights=WEIGHTS, pairs=PAIRS)
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    work = Work(4, 64, torch.float32, checkpointing)
    settings = [model.config.to_dict() for model in (loss.teacher, student)]
    planned = predict_encoder(EncoderRequest(task, *settings, WEIGHTS, "cosine", PAIRS, work, "adamw"))
    ids_BT = torch.arange(256).view(4, 64)
    place_BT = ids_BT % 16
    labels_BT = ids_BT.where(place_BT == 15, IGNORE)
    if task == "masked_language_model":
        labels_BT = ids_BT.where(torch.arange(256).view(4, 64) % 7 == 1, IGNORE)
    elif task == "classification":
        labels_BT = labels_BT.clamp(max=1)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(forget)
    own = [each for model in (student, loss.teacher) for each in (*model.parameters(), *model.buffers())]
    with Alive(own=own) as alive:
        loss(student.train(), Batch(ids_BT, place_BT, labels_BT)).total.backward()
    assert planned.activations == pytest.approx(max(alive.peaks.values()), rel=0.1)
    assert planned.gradients == sum(parameter.nbytes for parameter in trained)
    assert planned.weights == sum(parameter.nbytes for parameter in student.parameters())


def small_worker(**changes):
    tree = {"run": {"name": "a"}, "teacher": {"model": "minilm-l6"}, "student": {"layers": 3}, "workers": {"cpus": 1} | changes}
    return validate(tree | {"data": {"max_length": 256}, "distill": {"task": "embedding", "embedding_weight": 1.0, "micro_batch_size": 8}})


def test_a_distillation_that_cannot_fit_is_refused_with_the_cheapest_change():
    with pytest.raises(
        ConfigError, match=r"3 of 6 layers needs 1\.\d\d GiB .* a worker, most of it overhead .*give \[workers\] memory at least"
    ):
        distill_encoder.check(small_worker(memory="900MiB"))
    found = plan.run(small_worker(memory="1040MiB"), force=False)
    assert not found["distill"]["fits"] and "does not fit; set distill." in found["headline"][-1]
    parts = distill_encoder.check(small_worker(memory="2GiB")).parts
    assert parts.keys() == {"weights", "teacher", "gradients", "optimizer", "activations", "overhead"}
