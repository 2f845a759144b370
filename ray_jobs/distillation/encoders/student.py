"""The encoder that learns: layers of its teacher, or an encoder of its own; and which of its layers learn from which.

Shapes: H width.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.encoders.load import layer_list
from ray_jobs.training.models import load_tokenizer

HiddenLayers = Literal["last", "mapped"] | list[tuple[int, int]]
PROJECTION = "hidden_projection"
"""Name of the student's part that is trained with it and not exported."""


def cut_student(teacher: PreTrainedModel, layers: list[int], *, start: str) -> PreTrainedModel:
    """Return a new encoder of the teacher's architecture with so many layers, in float32, on the CPU.

    Args:
        layers: indices of the teacher's layers in rising order.
        start: teacher copies those layers and all that is no layer; random draws every weight anew.
    """
    student = copy.deepcopy(teacher).to("cpu", torch.float32).requires_grad_(True)
    name, found = layer_list(student)
    student.set_submodule(name, nn.ModuleList(found[index] for index in layers))
    student.config.num_hidden_layers = len(layers)
    if start == "random":
        fresh: Any = type(teacher)._from_config(student.config, dtype=torch.float32, attn_implementation="sdpa")
        fresh.base_model.pooler = getattr(student.base_model, "pooler", None) and fresh.base_model.pooler
        return fresh
    return student


def prepare_student(student: PreTrainedModel, *, task: str, teacher_width: int | None = None) -> PreTrainedModel:
    """Freeze what the task does not use, switch dropout off, and add the projection to the teacher's width where one is needed.

    The teacher says the same of a text each time, which noise in the student would blur; without it a step is also the
    same for any number of workers, and takes three quarters of the time on a CPU. The exported config keeps its dropout.

    Args:
        teacher_width: H of the teacher where hidden states are compared.
    """
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pooler = getattr(student.base_model, "pooler", None)
    if pooler is not None and task != "classification":
        pooler.requires_grad_(False)
    width = student.config.hidden_size
    if teacher_width is not None and teacher_width != width:
        # one projection for all layers: Jiao et al. 2019, arXiv:1909.10351, section 3.1
        student.add_module(PROJECTION, nn.Linear(width, teacher_width, bias=False))
    return student


def layer_pairs(hidden_layers: HiddenLayers, *, kept: list[int] | None, num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Return which layers' outputs meet, as (student, teacher) from 0.

    Args:
        hidden_layers: as [distill] says it.
        kept: the teacher's layers that the student was cut from; none for a student of its own.
        num_student: layers of the student.
        num_teacher: layers of the teacher.

    Raises:
        ConfigError: a layer that a model does not have, no pair, or "mapped" for a student of its own.
    """
    if hidden_layers == "last":
        return [(num_student - 1, num_teacher - 1)]
    if hidden_layers == "mapped":
        if kept is None:
            raise ConfigError(
                'distill.hidden_layers = "mapped" needs a student cut from the teacher, and student.model names one of its own: '
                'use "last" or pairs like [[0, 1], [1, 3]]'
            )
        return list(enumerate(kept))
    for mine, theirs in hidden_layers:
        if not (0 <= mine < num_student and 0 <= theirs < num_teacher):
            raise ConfigError(
                f"distill.hidden_layers has [{mine}, {theirs}], but the student has layers 0 to {num_student - 1} "
                f"and the teacher 0 to {num_teacher - 1}"
            )
    if not hidden_layers:
        raise ConfigError('distill.hidden_layers = [] compares nothing: use "last", "mapped" or pairs like [[0, 1]]')
    return [(mine, theirs) for mine, theirs in hidden_layers]


def check_width(student_width: int, teacher_width: int) -> None:
    """Refuse sentence embeddings of different widths, which have no cosine.

    Raises:
        ConfigError: names both.
    """
    if student_width != teacher_width:
        raise ConfigError(
            f"distill.embedding_weight compares embeddings: the student's have {student_width} numbers and the teacher's {teacher_width}; "
            "take a student of the teacher's width, or embedding_weight = 0 with hidden_weight (projected)"
        )


def check_classes(student_classes: int, teacher_classes: int) -> None:
    """Refuse classifiers of different classes, whose distributions cannot be compared.

    Raises:
        ConfigError: gives both numbers.
    """
    if student_classes != teacher_classes:
        raise ConfigError(
            f'distill.task = "classification" compares class distributions: the student has {student_classes} classes and the teacher '
            f"{teacher_classes}; take a student with the teacher's classes, or layers of the teacher (student.layers)"
        )


def export_encoder(student: PreTrainedModel, folder: Path, *, teacher_folder: Path, task: str) -> None:
    """Write the student as a plain Hugging Face folder; an embedding student with the sentence-transformers files of its teacher.

    Args:
        folder: gets the model and its tokenizer.
        teacher_folder: where the tokenizer and modules.json with its folders are copied from.
    """
    if hasattr(student, PROJECTION):
        delattr(student, PROJECTION)
    student.save_pretrained(folder)
    load_tokenizer(teacher_folder).save_pretrained(folder)
    if task == "embedding":
        _copy_sentence_files(teacher_folder, folder)


def _copy_sentence_files(source: Path, target: Path) -> None:
    names = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
    names += [str(path.relative_to(source)) for path in source.glob("[0-9]_*/config.json")]
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes((source / name).read_bytes())
