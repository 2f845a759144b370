"""The numbers that decide a training run, and the learning rate of each step."""

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; the fields are those of the config's [finetune], [finetune.lora] and [distill] of the same name."""

    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    plus_ratio: float | None = None
    max_grad_norm: float = 1.0
    global_batch_size: int = 8
    micro_batch_size: int = 2
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    eval_every_steps: int = 0
    checkpoint_every_steps: int = 10
    log_every_steps: int = 1
    seed: int = 0

    @classmethod
    def of(cls, section: dict[str, Any], *, seed: int) -> "Recipe":
        """Return the recipe in a config section's fields; those that are no part of it are left out."""
        known = {field.name for field in fields(cls)}
        flat = {**section.get("lora", {}), **section}
        return cls(**{key: value for key, value in flat.items() if key in known}, seed=seed)

    def num_steps(self, num_rows: int) -> int:
        """Return the optimizer steps: `max_steps`, or so many passes over the rows; at least 1."""
        return self.max_steps or max(1, round(self.epochs * num_rows / self.global_batch_size))

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step (counted from 0): linear warm-up, then `schedule` towards 0."""
        warmup = round(self.warmup_share * num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, num_steps - warmup)
        factor = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.learning_rate * factor
