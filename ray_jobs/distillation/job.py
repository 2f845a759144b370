"""A language model's distillation as each worker does it: teacher, student, targets and loss. Plain values; picklable."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ray_jobs.core.models import resolve_model
from ray_jobs.core.run_folder import ModelSource
from ray_jobs.distillation.by_source import TeachersBySource
from ray_jobs.distillation.choose_loss import choose_loss
from ray_jobs.distillation.hidden_states import prepare_hidden
from ray_jobs.distillation.layers import choose_layers
from ray_jobs.distillation.making import Student
from ray_jobs.distillation.shares import FIRST, share_out, teaching_of
from ray_jobs.distillation.sources import Cache, Teacher, make_targets
from ray_jobs.distillation.start import Start
from ray_jobs.distillation.student import student_settings
from ray_jobs.distillation.targets import Targets
from ray_jobs.distillation.teacher import load_teacher
from ray_jobs.distillation.texts import text_loss
from ray_jobs.distillation.vocabulary import chat_template, shared_vocabulary, shared_with_others
from ray_jobs.training.architecture import find_architecture
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.models import Quantization, choose_dtype, skeleton
from ray_jobs.training.skeletons import num_parameters, skeleton_of


@dataclass(frozen=True, kw_only=True)
class DistillJob:
    """Whom to teach what, in the words of the config's [teacher], [student] and [distill]."""

    teacher: ModelSource
    """The fine-tuned teacher."""
    base: str
    """What it was fine-tuned from, whose tokenizer made the rows."""
    student: dict[str, Any]
    """Fields of [student]."""
    distill: dict[str, Any]
    """Fields of [distill]."""
    teacher_dtype: str
    """Of the teacher's matrix products."""
    double_quantization: bool
    """How a quantized teacher's constants are stored."""
    cache: Cache | None
    row_tokens: int
    """Tokens that a packed row may have."""
    seed: int

    @property
    def others(self) -> dict[str, str]:
        """The models of [distill.teachers] by name."""
        return {name: each["model"] for name, each in self.distill["teachers"].items()}

    @property
    def teachers(self) -> dict[str, ModelSource]:
        """All teachers by name, the fine-tuned one first."""
        return {FIRST: self.teacher, **{name: ModelSource(model) for name, model in self.others.items()}}

    @property
    def stored_as(self) -> str:
        """How the teachers' linear layers are stored, in words that differ where their numbers do: a cache is told apart by them."""
        kind = self.distill["teacher_quantization"]
        return f"{kind} with double quantization" if kind in ("nf4", "fp4") and self.double_quantization else kind

    def load_teacher(self, device: str, name: str = FIRST) -> Any:
        """Return a frozen teacher on a device, stored as [distill] says."""
        kind, dtype = self.distill["teacher_quantization"], choose_dtype(self.teacher_dtype, device)
        stored = None if kind == "none" else Quantization(kind, self.double_quantization)
        return load_teacher(*self.teachers[name], dtype=dtype, quantization=stored, device=device)

    def first_start(self) -> Start:
        """Return the student's own model, or as many layers of the teacher, evenly spaced where they are not named.

        Raises:
            ConfigError: layers that the teacher does not have.
        """
        if self.student["model"] is not None:
            return Start(self.student["model"])
        layers = choose_layers(find_architecture(self.base).config.num_hidden_layers, self.student["layers"])
        random_seed = self.seed if self.student["start"] == "random" else None
        return Start(self.teacher.model, tuple(layers), self.teacher.adapter, random_seed)

    def student_from(self, start: Start) -> Student:
        """Return how the student is made and written.

        Raises:
            ConfigError: its vocabulary is not the teacher's, and the loss needs it to be.
        """
        section, named, same = self.distill, self.student["model"], self.distill["vocabulary"] == "same"
        compared = [shared_vocabulary(named, self.base)] if named and same else []
        compared += shared_with_others(named or self.base, self.others) if same else []
        return Student(
            start,
            tokenizer=named or self.base,
            method=section["method"],
            dtype=section["dtype"],
            lora={key: value for key, value in section["lora"].items() if key != "plus_ratio"},  # which is the optimizer's
            quantization=Quantization(**section["quantization"]),
            num_tokens=min(compared, default=None),
            chat_template=None if same else chat_template(self.base),
        )

    @property
    def student_settings(self) -> dict[str, Any]:
        """The student's config.json."""
        if self.student["model"]:
            return find_architecture(self.student["model"]).settings
        return student_settings(find_architecture(self.base).config, self.student["layers"])

    @property
    def num_parameters(self) -> dict[str, int]:
        """Parameters of the `teacher`'s base and of the `student` as it is exported."""
        shapes = {"teacher": find_architecture(self.base).settings, "student": self.student_settings}
        return {name: num_parameters(skeleton_of(settings)) for name, settings in shapes.items()}

    def told(self, sources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what the manifest says of several teachers: model, names of the sources and weight; nothing of one."""
        teaching, models = teaching_of(self.distill), {FIRST: self.base, **self.others}
        return {
            name: {"model": models[name], "sources": [source for source in sources if each.covers(source)], "weight": each.weight}
            for name, each in (teaching.items() if self.others else ())
        }

    def open_rows(self, sources: Mapping[str, Mapping[str, int]]) -> Any:
        """Return what opens packed rows: with the source of each token where several teachers need it.

        Args:
            sources: counts by name, as prepare's manifest lists them.
        """
        return functools.partial(PackedRows, sources=list(sources)) if self.others else PackedRows

    def build(
        self, student: Student, pools: Mapping[str, Any], num_rows: int, sources: Mapping[str, Mapping[str, int]], device: str
    ) -> tuple[Any, Any]:
        """Return the student and its loss on a device, equal on all workers.

        Args:
            pools: handles of the teachers' pools by name; none where they are in the worker or silent.
            num_rows: training rows over all workers.
            sources: as in `open_rows`.
        """
        section, model, shape = self.distill, student.load(device), skeleton(resolve_model(self.teacher.model))
        if section["targets"] == "text":
            return model, text_loss
        hidden, layers = prepare_hidden(model, shape, section, kept=student.start.layers, seed=self.seed)
        options = {"ahead": section["pool"]["ahead"], "num_tokens": student.num_tokens, "layers": layers, "device": device}
        targets = self._targets(pools, num_rows, sources, **options)
        names = {"student": student, "teacher": self.base, "max_length": model.config.max_position_embeddings}
        return model, choose_loss(section, targets, hidden, row_tokens=self.row_tokens, **names)

    def _targets(self, pools: Mapping[str, Any], num_rows: int, sources: Mapping[str, Mapping[str, int]], **options: Any) -> Targets:
        """Return one teacher's targets, or all teachers' by source."""
        cache, teaching = self.cache, teaching_of(self.distill)
        if cache is not None:
            cache = cache._replace(budget_bytes=cache.budget_bytes // len(teaching))
        found = {}
        for name, model in self.teachers.items():
            teacher = Teacher(*model, self.stored_as, self.teacher_dtype, functools.partial(self.load_teacher, name=name))
            own = sum(counts.get("train_rows", num_rows) for source, counts in sources.items() if teaching[name].covers(source))
            found[name] = make_targets(teacher, pool=pools.get(name), cache=cache, num_rows=min(num_rows, max(1, own)), **options)
        if not self.others:
            return found[FIRST]
        return TeachersBySource(found, torch.tensor(share_out(teaching, list(sources))))
