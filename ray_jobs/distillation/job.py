"""A language model's distillation as each worker does it: teacher, student, targets and loss. Plain values; picklable."""

from dataclasses import dataclass
from typing import Any

from ray_jobs.core.models import resolve_model
from ray_jobs.core.run_folder import ModelSource
from ray_jobs.distillation.choose_loss import choose_loss
from ray_jobs.distillation.hidden_states import prepare_hidden
from ray_jobs.distillation.layers import choose_layers
from ray_jobs.distillation.making import Student
from ray_jobs.distillation.sources import Cache, Teacher, make_targets
from ray_jobs.distillation.start import Start
from ray_jobs.distillation.student import student_settings
from ray_jobs.distillation.teacher import load_teacher
from ray_jobs.distillation.texts import text_loss
from ray_jobs.distillation.vocabulary import chat_template, shared_vocabulary
from ray_jobs.training.architecture import find_architecture
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

    def load_teacher(self, device: str) -> Any:
        """Return the frozen teacher on a device, stored as [distill] says."""
        kind = self.distill["teacher_quantization"]
        stored = None if kind == "none" else Quantization(kind, self.double_quantization)
        return load_teacher(*self.teacher, dtype=choose_dtype(self.teacher_dtype, device), quantization=stored, device=device)

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
        return Student(
            start,
            tokenizer=named or self.base,
            method=section["method"],
            dtype=section["dtype"],
            lora={key: value for key, value in section["lora"].items() if key != "plus_ratio"},  # which is the optimizer's
            quantization=Quantization(**section["quantization"]),
            num_tokens=shared_vocabulary(named, self.base) if named and same else None,
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

    def build(self, student: Student, pool: Any, num_rows: int, device: str) -> tuple[Any, Any]:
        """Return the student and its loss on a device, equal on all workers.

        Args:
            pool: handle of the teachers' pool; none where the teacher is in the worker or silent.
            num_rows: training rows over all workers.
        """
        section, model, shape = self.distill, student.load(device), skeleton(resolve_model(self.teacher.model))
        if section["targets"] == "text":
            return model, text_loss
        hidden, layers = prepare_hidden(model, shape, section, kept=student.start.layers, seed=self.seed)
        teacher = Teacher(*self.teacher, section["teacher_quantization"], self.teacher_dtype, self.load_teacher)
        sizes = {"ahead": section["pool"]["ahead"], "num_rows": num_rows, "num_tokens": student.num_tokens}
        targets = make_targets(teacher, device=device, pool=pool, cache=self.cache, layers=layers, **sizes)
        names = {"student": student, "teacher": self.base, "max_length": model.config.max_position_embeddings}
        return model, choose_loss(section, targets, hidden, row_tokens=self.row_tokens, **names)
