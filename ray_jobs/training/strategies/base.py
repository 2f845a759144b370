"""What the training loop asks of a strategy, and what those on torch's own optimizers have in common."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import Loss, LossSums
from ray_jobs.training.optimizers import load_parameter_states, parameter_state, set_learning_rate

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
"""Called with the model once its parameters are what the optimizer will change."""
State = dict[str, Tensor]
"""An optimizer's state of one parameter by name; numbers are tensors without axes."""


def autocast(device: torch.device, dtype: torch.dtype, *, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which matrix products are computed in `dtype`; parameters keep their own."""
    return torch.autocast(device.type, dtype, cache_enabled=cache) if dtype is not torch.float32 else contextlib.nullcontext()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class LossModule(nn.Module):
    """The loss as a module's forward, so that a strategy's hooks see the whole of it, the output head included."""

    def __init__(self, model: nn.Module, loss: Loss, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self._loss = (loss,)  # in a tuple: a loss that is a module (with a teacher in it) is not part of what is trained
        self._dtype = dtype
        self._device = next(model.parameters()).device
        self.caches_casts = True
        """Whether a parameter's copy in the computation type stays until the forward pass ends."""

    def forward(self, batch: Batch) -> LossSums:
        """Return the loss of a micro-batch on the model's device."""
        with autocast(self._device, self._dtype, cache=self.caches_casts):
            return self._loss[0](self.model, batch)


class Strategy(abc.ABC):
    """How workers share one optimizer step. Every worker calls every method, in the same order.

    The gradient is the mean over workers of each one's, summed over the micro-batches since the last update.
    """

    _module: LossModule

    @abc.abstractmethod
    def prepare(self, module: LossModule, build_optimizer: BuildOptimizer, *, dtype: torch.dtype, max_grad_norm: float) -> None:
        """Take a model, equal on all workers and on its device, and make its optimizer.

        Weights that are postponed are read here: part by part where this worker keeps a part of each.

        Args:
            dtype: of matrix products; float16 scales the loss.
            max_grad_norm: gradients are clipped to this norm over all parameters and workers.
        """

    @abc.abstractmethod
    def forward(self, batch: Batch, *, last: bool = True) -> LossSums:
        """Return the loss of a micro-batch on this worker's device, with or without gradients, in the model's mode.

        Args:
            last: whether it is the last micro-batch before an update.
        """

    @abc.abstractmethod
    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of a scalar made of what `forward` returned."""

    @abc.abstractmethod
    def update(self, learning_rate: float) -> float:
        """Clip, step, forget the gradients; return their norm before clipping. A step whose gradients overflow float16 is left out."""

    @abc.abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained parameters by name, one at a time, each whole on worker 0."""

    @abc.abstractmethod
    def optimizer_state(self) -> Iterator[tuple[str, State]]:
        """Yield the optimizer's state by the parameter's name, one at a time, each whole on worker 0."""

    @abc.abstractmethod
    def load_optimizer_state(self, states: Mapping[str, State]) -> None:
        """Put back what `optimizer_state` yielded, under any strategy and number of workers."""

    @abc.abstractmethod
    def scaler_state(self) -> dict[str, Any]:
        """Return the loss scale's state as numbers; empty where the loss is not scaled."""

    @abc.abstractmethod
    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Put back what `scaler_state` returned under any strategy."""

    @property
    def in_pieces(self) -> bool:
        """Whether no worker holds all of the trained parameters."""
        return False

    @abc.abstractmethod
    def after_evaluation(self) -> None:
        """Put the parameters back into the form in which they are trained."""

    @abc.abstractmethod
    def release(self) -> None:
        """Let go of the model after the last step."""


class TorchStrategy(Strategy):
    """Clipping, float16 scaling and stepping by torch's own parts."""

    _optimizer: torch.optim.Optimizer
    _scaler: GradScaler
    _parameters: dict[str, nn.Parameter]
    _max_grad_norm: float

    def _make_optimizer(self, build_optimizer: BuildOptimizer, device: torch.device, dtype: torch.dtype, max_grad_norm: float) -> None:
        self._parameters, self._max_grad_norm = trainable(self._module.model), max_grad_norm
        self._optimizer = build_optimizer(self._module.model)
        self._scaler = GradScaler(device.type, enabled=dtype is torch.float16)

    def update(self, learning_rate: float) -> float:
        """Clip, step, forget the gradients; return their norm before clipping."""
        set_learning_rate(self._optimizer, learning_rate)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return float(self._whole(norm))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained parameters by name."""
        for name, parameter in self._parameters.items():
            yield name, self._whole(parameter.detach())

    def optimizer_state(self) -> Iterator[tuple[str, State]]:
        """Yield the optimizer's state by the parameter's name."""
        for name, parameter in self._parameters.items():
            state = parameter_state(self._optimizer, parameter)
            yield name, {key: self._whole(value) for key, value in state.items()}

    def load_optimizer_state(self, states: Mapping[str, State]) -> None:
        """Put back what `optimizer_state` yielded."""
        pieces = (
            (parameter, {key: self._piece(value, parameter) for key, value in states[name].items()})
            for name, parameter in self._parameters.items()
            if name in states
        )
        load_parameter_states(self._optimizer, pieces)

    def scaler_state(self) -> dict[str, Any]:
        """Return the state of the loss scale."""
        return self._scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Put back a state of the loss scale."""
        if state:
            self._scaler.load_state_dict(state)

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def _piece(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        return value
