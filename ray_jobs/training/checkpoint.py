"""What a run needs to go on exactly: trainable tensors, optimizer tensors, and where it was; nothing pickled.

Rows and random numbers of a step are functions of (seed, step, rank), so the step says where they stand.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.amp import GradScaler

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.training.optimizers import load_optimizer_tensors, optimizer_tensors


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Packed tokens seen, over all workers."""
    seconds: float = 0.0
    """Time spent in steps, over all attempts."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl."""
    eval_before: dict[str, Any] | None = None
    """Evaluation before the first step."""
    eval_after: dict[str, Any] | None = None
    """Evaluation after the last step."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler, progress: Progress) -> None:
    """Write trainable.safetensors, optimizer.safetensors and progress.json."""
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable(model).items()}
    save_file(weights, folder / "trainable.safetensors")
    save_file(optimizer_tensors(optimizer), folder / "optimizer.safetensors")
    (folder / "progress.json").write_text(json.dumps({"progress": asdict(progress), "scaler": scaler.state_dict()}))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler) -> Progress:
    """Put a checkpoint's tensors in place and return its progress.

    Raises:
        TrainingFailed: the checkpoint is of a model with other trainable tensors.
    """
    weights = load_file(folder / "trainable.safetensors")
    places = trainable(model)
    if weights.keys() != places.keys():
        raise TrainingFailed(
            f"checkpoint {folder} has {len(weights)} trainable tensors, the model {len(places)}, with other names: "
            "it is of another model; use --force to start anew"
        )
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(weights[name])
    load_optimizer_tensors(optimizer, load_file(folder / "optimizer.safetensors"))
    saved = json.loads((folder / "progress.json").read_text())
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return Progress(**saved["progress"])
