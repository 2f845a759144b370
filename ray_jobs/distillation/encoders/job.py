"""An encoder's distillation as each worker does it: models and loss, rows, export. Plain values; picklable."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import resolve_model
from ray_jobs.distillation.encoders.kinds import check_task
from ray_jobs.distillation.layers import choose_layers

if TYPE_CHECKING:
    from ray_jobs.distillation.encoders.plan import EncoderRequest

_ONLY = {
    "targets": "worker",
    "on_policy.share": 0.0,
    "cache.folder": None,
    "teachers": {},
    "vocabulary": "same",
    "method": "full",
    "teacher_quantization": "none",
    "balance": "none",
}
"""Fields of [distill] that encoders have one value of."""


@dataclass(frozen=True, kw_only=True)
class EncoderJob:
    """What to teach which encoder, in the words of the config's [teacher], [student] and [distill]."""

    task: str
    teacher: str
    student: str | None
    layers: int | list[int]
    start: str
    divergence: dict[str, Any]
    """Kind, beta, skew and temperature."""
    weights: dict[str, float]
    hidden_loss: str
    hidden_layers: Any
    dtype: str
    seed: int

    @classmethod
    def of(cls, *, teacher: str, student: dict[str, Any], distill: dict[str, Any], seed: int) -> "EncoderJob":
        """Return the job of a config's sections.

        Raises:
            ConfigError: a field asks for what encoders do not have.
        """
        for field, allowed in _ONLY.items():
            value: Any = distill
            for part in field.split("."):
                value = value[part]
            if value != allowed:
                raise ConfigError(
                    f'distill.{field} = {json.dumps(value)} is for language models: with distill.task = "{distill["task"]}" leave it at '
                    f"{json.dumps(allowed)}"
                )
        weights = {name: distill[f"{name}_weight"] for name in ("kd", "ce", "hidden", "embedding")}
        shared = {name: distill[name] for name in ("task", "hidden_loss", "hidden_layers", "dtype")}
        shared["divergence"] = {"kind": distill["divergence"], "temperature": distill["kd_temperature"]}
        shared["divergence"] |= {name: distill[name] for name in ("beta", "skew")}
        return cls(
            teacher=teacher,
            student=student["model"],
            layers=student["layers"],
            start=student["start"],
            weights=weights,
            seed=seed,
            **shared,
        )

    def check(self) -> None:
        """Refuse models that the task or the loss cannot take; reads configs and tokenizers, no weights.

        Raises:
            ConfigError: a model that is no such encoder, layers that there are not, another vocabulary, or other widths.
        """
        from ray_jobs.distillation.encoders.student import check_classes, check_width, layer_pairs
        from ray_jobs.distillation.vocabulary import shared_vocabulary

        teacher, student = self._config("teacher.model", self.teacher), None
        if self.student is not None:
            student = self._config("student.model", self.student)
            shared_vocabulary(self.student, self.teacher)
            if self.weights["embedding"]:
                check_width(student.hidden_size, teacher.hidden_size)
            if self.task == "classification":
                check_classes(student.num_labels, teacher.num_labels)
        kept = self._kept(teacher.num_hidden_layers)
        num_student = len(kept) if kept is not None else student.num_hidden_layers  # type: ignore[union-attr]
        if self.weights["hidden"]:
            layer_pairs(self.hidden_layers, kept=kept, num_student=num_student, num_teacher=teacher.num_hidden_layers)

    def memory_request(self, *, length: int, section: dict[str, Any], workers: Any) -> "EncoderRequest":
        """Return what decides the memory of one worker.

        Args:
            length: tokens of a packed row.
            section: fields of [distill].
            workers: has the fields of [workers].
        """
        import torch

        from ray_jobs.distillation.encoders.loss import Weights
        from ray_jobs.distillation.encoders.plan import EncoderRequest
        from ray_jobs.distillation.encoders.student import layer_pairs
        from ray_jobs.distillation.student import shrink_config
        from ray_jobs.training.memory_plan import Work
        from ray_jobs.training.models import choose_dtype
        from ray_jobs.training.sharding_plan import Sharding

        teacher, device = self._config("teacher.model", self.teacher), "cuda" if workers.gpus > 0 else "cpu"
        kept = self._kept(teacher.num_hidden_layers)
        student = shrink_config(teacher, kept) if kept is not None else self._config("student.model", str(self.student))
        layers = {"num_student": student.num_hidden_layers, "num_teacher": teacher.num_hidden_layers}
        dtype = torch.bfloat16 if device == "cuda" and self.dtype == "auto" else choose_dtype(self.dtype)
        return EncoderRequest(
            task=self.task,
            teacher=teacher.to_dict(),
            student=student.to_dict(),
            weights=Weights(**self.weights),
            hidden_loss=self.hidden_loss,
            pairs=layer_pairs(self.hidden_layers, kept=kept, **layers) if self.weights["hidden"] else [],
            work=Work(section["micro_batch_size"], length, dtype, section["gradient_checkpointing"], device),
            optimizer=section["optimizer"],
            sharding=Sharding(workers.strategy, workers.min_workers, workers.zero_stage, workers.offload),
        )

    def build(self, device: str) -> tuple[Any, Any]:
        """Return the student and its loss on a device, equal on all workers."""
        import torch

        from ray_jobs.distillation.divergence import Divergence
        from ray_jobs.distillation.encoders.load import load_encoder
        from ray_jobs.distillation.encoders.loss import EncoderLoss, Weights
        from ray_jobs.distillation.encoders.student import cut_student, layer_pairs, prepare_student
        from ray_jobs.training.models import choose_dtype

        teacher = load_encoder(resolve_model(self.teacher), self.task, dtype=choose_dtype(self.dtype, device), device=device)
        kept = self._kept(teacher.config.num_hidden_layers)
        if kept is not None:
            student = cut_student(teacher, kept, start=self.start)
        else:
            student = load_encoder(resolve_model(str(self.student)), self.task, dtype=torch.float32)
        layers = {"num_student": student.config.num_hidden_layers, "num_teacher": teacher.config.num_hidden_layers}
        pairs = layer_pairs(self.hidden_layers, kept=kept, **layers) if self.weights["hidden"] else []
        width = teacher.config.hidden_size if self.weights["hidden"] else None
        student = prepare_student(student, task=self.task, teacher_width=width).to(device)
        loss = EncoderLoss(
            teacher,
            task=self.task,
            weights=Weights(**self.weights),
            divergence=Divergence(**self.divergence),
            hidden_loss=self.hidden_loss,
            pairs=pairs,
        )
        return student, loss

    def open_rows(self, folder: Path) -> Any:
        """Return the packed rows of a folder; masked anew each epoch where the task is to predict masked tokens."""
        from ray_jobs.distillation.encoders.rows import MaskedRows
        from ray_jobs.training.batches import PackedRows
        from ray_jobs.training.models import load_tokenizer

        if self.task != "masked_language_model":
            return PackedRows(folder)
        tokenizer = load_tokenizer(resolve_model(self.teacher))
        return MaskedRows(folder, mask_id=tokenizer.mask_token_id, vocab_size=len(tokenizer), seed=self.seed)

    def export(self, model: Any, folder: Path) -> None:
        """Write the student as a plain model folder."""
        from ray_jobs.distillation.encoders.student import export_encoder

        export_encoder(model, folder, teacher_folder=resolve_model(self.teacher), task=self.task)

    @property
    def words(self) -> str:
        """What is taught to whom, for people."""
        num_kept = self.layers if isinstance(self.layers, int) else len(self.layers)
        random = " with random weights" if self.start == "random" else ""
        return f"{self.task} of {self.teacher} into {self.student or f'{num_kept} layers of the teacher{random}'}"

    def kept(self) -> list[int] | None:
        """Return the teacher's layers that the student is cut from; none for a student of its own."""
        return self._kept(self._config("teacher.model", self.teacher).num_hidden_layers)

    def measure_influence(self, rows: Any, device: str, micro_batch_size: int) -> dict[str, Any]:
        """Return the block influence of the teacher's layers on training rows, nothing masked.

        Args:
            rows: storage folder with `train`.
        """
        from ray_jobs.distillation.encoders.influence import measure_encoder_influence
        from ray_jobs.distillation.encoders.load import load_encoder
        from ray_jobs.training.batches import PackedRows
        from ray_jobs.training.models import choose_dtype

        teacher = load_encoder(resolve_model(self.teacher), self.task, dtype=choose_dtype(self.dtype, device), device=device)
        return measure_encoder_influence(teacher, PackedRows(rows.local("train")), seed=self.seed, micro_batch_size=micro_batch_size)

    def _kept(self, num_teacher_layers: int) -> list[int] | None:
        return None if self.student is not None else choose_layers(num_teacher_layers, self.layers)

    def _config(self, field: str, name: str) -> Any:
        from ray_jobs.training.architecture import find_architecture

        found = find_architecture(name)
        check_task(self.task, found.settings, field=field, name=name)
        return found.config
