"""How the student is made before training, and written after it: whole, or as an adapter that is then merged."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import resolve_model
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.hidden_states import drop_projection
from ray_jobs.distillation.start import Start, load_start, start_folder
from ray_jobs.training.adapters import add_lora, check_lora, check_storage, load_merged
from ray_jobs.training.losses import causal_lm
from ray_jobs.training.models import Quantization, check_unquantized, choose_dtype, load_tokenizer
from ray_jobs.training.skeletons import skeleton_of

ADAPTER, STUDENT = "adapter", "student"


class Student(NamedTuple):
    """What decides how the student is made and written; picklable."""

    start: Start
    tokenizer: str
    """Name of the model whose tokenizer it speaks."""
    method: str = "full"
    """full, lora or qlora."""
    dtype: str = "auto"
    """Computation type, as in the config."""
    lora: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Options of `add_lora`."""
    quantization: Quantization = Quantization()
    """How qlora stores the frozen weights."""
    num_tokens: int | None = None
    """Rows of its head that the teacher's has too; none is all."""
    chat_template: str | None = None
    """What it was trained on, where that is not its tokenizer's own."""

    @property
    def export_name(self) -> str:
        """What the workers leave in the stage's folder."""
        return STUDENT if self.method == "full" else ADAPTER

    @property
    def words(self) -> str:
        """The student, for people."""
        layers, start = self.start.layers, self.start
        random = " with random weights" if start.random_seed is not None else ""
        return (start.model if layers is None else f"{len(layers)} layers of the teacher{random}") + (
            "" if self.method == "full" else f" by {self.method}"
        )

    def check(self, settings: dict[str, Any], *, device: str) -> None:
        """Refuse a student that cannot be trained so.

        Args:
            settings: its config.json.
            device: cpu or cuda.

        Raises:
            ConfigError: adapters on random weights, adapters that it cannot hold, or DoRA on int8 weights on a CPU.
            ModelError: its weights are quantized already, and are to be cut, trained whole, or stored in fewer bits.
        """
        if self.method != "full":
            if self.start.random_seed is not None:
                raise ConfigError(
                    f'student.start = "random" cannot learn by distill.method = "{self.method}": adapters leave the random weights as '
                    'they are; use method = "full", or start = "teacher"'
                )
            check_lora(skeleton_of(settings), rank=self.lora["rank"], targets=self.lora["targets"], section="distill")
        if self.method != "lora" or self.start.layers is not None:
            check_unquantized(resolve_model(self.start.model), what=f"distill.method = {self.method}")
        if self._stored is not None:
            check_storage(self.quantization.type, dora=self.lora["dora"], device=device, section="distill")

    def load(self, device: str) -> Any:
        """Return the student with what trains in float32: all of it, or adapters on frozen weights."""
        if self.method == "full":
            return load_start(self.start, dtype=torch.float32, device=device)
        base = load_start(self.start, dtype=choose_dtype(self.dtype, device), quantization=self._stored, device=device)
        return add_lora(base, **self.lora)

    def write(self, model: Any, folder: Path, *, device: str) -> None:
        """Write what training left on worker 0: a whole model in its computation type with its tokenizer, or the adapter alone.

        Args:
            device: where it was trained; a model that was in pieces lies on the CPU by now.
        """
        drop_projection(model)
        if causal_lm(model) is not model:  # it has adapters
            model.peft_config["default"].base_model_name_or_path = self.start.model
            model.save_pretrained(folder, save_embedding_layers=False)
            return
        self._save(model.to(choose_dtype(self.dtype, device)), folder)

    def write_merged(self, stage: Storage, *, device: str) -> None:
        """Write the plain folder `student` of a stage from its `adapter`.

        The student is made anew: a strategy may have left its frozen weights in pieces. Under qlora they are written
        as their storage rounded them, because that is the model that was trained.
        """
        dtype = choose_dtype(self.dtype, device)
        with tempfile.TemporaryDirectory() as temporary, start_folder(self.start, dtype=dtype) as base:
            merged = load_merged(base, stage.local(ADAPTER), dtype=dtype, quantization=self._stored, device=device)
            self._save(merged, Path(temporary))
            stage.upload(Path(temporary), STUDENT)

    @property
    def _stored(self) -> Quantization | None:
        return self.quantization if self.method == "qlora" else None

    def _save(self, model: Any, folder: Path) -> None:
        tokenizer = load_tokenizer(resolve_model(self.tokenizer))
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
            model.generation_config.eos_token_id = tokenizer.eos_token_id  # with which each answer ended
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
