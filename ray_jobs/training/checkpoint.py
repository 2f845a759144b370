"""What a run needs to go on exactly: trained weights, optimizer state, and where it was; nothing pickled.

A checkpoint knows neither strategy nor number of workers: whole tensors by the parameter's name, in safetensors files
of bounded size, so that no worker ever holds all of them. Rows and random numbers of a step are functions of
(seed, step, rank), so the step says where they stand.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.training.postponed import is_postponed, postpone
from ray_jobs.training.strategies.base import State, Strategy, trainable

FILE_BYTES = 2 * 10**9
"""Size from which a file of a checkpoint is followed by another."""
PROGRESS = "progress.json"


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
    loss_state: dict[str, float] = field(default_factory=dict)
    """What the loss carries from step to step."""


class TensorFiles:
    """Writes tensors as KIND-00001.safetensors, KIND-00002.safetensors, ...; without a folder it only lets them pass.

    Args:
        folder: where to write; none on all workers but one.
        kind: what the tensors are, the first part of the files' names.
        file_bytes: size from which a next file begins.
    """

    def __init__(self, folder: Path | None, kind: str, *, file_bytes: int = FILE_BYTES):
        self.folder, self._kind, self._file_bytes = folder, kind, file_bytes
        self._waiting: dict[str, Tensor] = {}
        self.names: list[str] = []
        """Files written so far."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it may be overwritten afterwards."""
        if self.folder is None:
            return
        self._waiting[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(waiting.nbytes for waiting in self._waiting.values()) >= self._file_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was taken since the last file."""
        if self.folder is not None and self._waiting:
            self.names.append(f"{self._kind}-{len(self.names) + 1:05}.safetensors")
            save_file(self._waiting, self.folder / self.names[-1])
            self._waiting = {}


def save_checkpoint(folder: Path | None, strategy: Strategy, progress: Progress) -> None:
    """Write a checkpoint; every worker must call it, and one gives a folder.

    Files: trainable-*.safetensors, optimizer-*.safetensors (PARAMETER.NAME), and last progress.json, which names them.
    """
    weights, moments = TensorFiles(folder, "trainable"), TensorFiles(folder, "optimizer")
    for name, tensor in strategy.weights():
        weights.add(name, tensor)
    for name, state in strategy.optimizer_state():
        for key, value in state.items():
            moments.add(f"{name}.{key}", value)
    for files in (weights, moments):
        files.flush()
    if folder is not None:
        kinds = {"trainable": weights.names, "optimizer": moments.names}
        facts = {"progress": asdict(progress), "scaler": strategy.scaler_state(), "files": kinds}
        (folder / PROGRESS).write_text(json.dumps(facts))


def put_tensors(model: nn.Module, files: TensorFiles) -> None:
    """Put tensors that were written in place of a model's parameters of the same names, on the CPU and as they lie in the files."""
    places = _places(files.folder, files.names)
    old = {id(parameter): name for name, parameter in model.named_parameters() if name in places}
    new = {name: nn.Parameter(file.get_tensor(name)) for name, file in places.items()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in old:
                module._parameters[key] = new[old[id(parameter)]]


class Checkpoint:
    """A checkpoint that `save_checkpoint` wrote; its tensors are read when they are asked for.

    Raises:
        TrainingFailed: a file is missing or not whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            facts = json.loads((folder / PROGRESS).read_text())
            self.progress, self.scaler = Progress(**facts["progress"]), facts["scaler"]
            self._weights, self._moments = (_places(folder, facts["files"][kind]) for kind in ("trainable", "optimizer"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TrainingFailed(
                f"checkpoint {folder} is not whole ({type(error).__name__}: {error}): delete it to go on from the one before, "
                "or use --force to start anew"
            ) from error

    @torch.no_grad()
    def put_weights(self, model: nn.Module) -> None:
        """Copy the trained weights into a whole model; those of the model that are postponed come from here when they are read.

        Raises:
            TrainingFailed: the model has other trainable tensors.
        """
        places = trainable(model)
        if self._weights.keys() != places.keys():
            raise TrainingFailed(
                f"checkpoint {self.folder} has {len(self._weights)} trainable tensors, the model {len(places)}, with other names: "
                "it is of another model; use --force to start anew"
            )
        for name, parameter in places.items():
            read = functools.partial(self._weights[name].get_tensor, name)
            if is_postponed(parameter):
                postpone(parameter, read)
            else:
                parameter.copy_(read())

    def optimizer_state(self) -> Mapping[str, State]:
        """Return the optimizer's state by the parameter's name."""
        return _States(self._moments)


class _States(Mapping[str, State]):
    """The optimizer's state by the parameter's name, each read when it is asked for."""

    def __init__(self, places: dict[str, Any]):
        self._files: dict[str, dict[str, Any]] = {}
        for place, file in places.items():
            name, _, key = place.rpartition(".")
            self._files.setdefault(name, {})[key] = file

    def __getitem__(self, name: str) -> State:
        return {key: file.get_tensor(f"{name}.{key}") for key, file in self._files[name].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _places(folder: Path, files: list[str]) -> dict[str, Any]:
    """Return the open file that holds each tensor."""
    opened = [safe_open(folder / name, framework="pt") for name in files]
    return {name: file for file in opened for name in file.keys()}
