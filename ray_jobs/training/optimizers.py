"""The optimizer of a run: AdamW with float32 or 8-bit moments, LoRA+ learning rates, and its state as plain tensors."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

RATIO = "learning_rate_ratio"
"""Key of a parameter group: its learning rate over the step's."""
_CONSTANT = ("qmap1", "qmap2")  # bitsandbytes' code books, the same for every parameter


def available_optimizer(name: str, device: str) -> tuple[str, str]:
    """Return the optimizer that a device can run in place of a config's, and why it is another ("" where it is the same).

    Args:
        name: adamw, adamw_8bit or paged_adamw_8bit.
        device: cpu, cuda or cuda:N.
    """
    if name == "paged_adamw_8bit" and not device.startswith("cuda"):
        return "adamw_8bit", "paged_adamw_8bit moves GPU memory to the host, and this worker has no GPU"
    return name, ""


def describe_optimizer(name: str, device: str) -> str:
    """Return what runs on a device, for people: "adamw_8bit (paged_adamw_8bit moves ...)"."""
    chosen, reason = available_optimizer(name, device)
    return f"{chosen} ({reason})" if reason else chosen


def build_optimizer(
    model: nn.Module, *, name: str, learning_rate: float, weight_decay: float, plus_ratio: float | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of a model's trainable parameters; `set_learning_rate` sets the rate of a step.

    Args:
        model: on its device already; its parameters are matrices (decayed) and vectors (not decayed).
        name: adamw, adamw_8bit or paged_adamw_8bit.
        weight_decay: decoupled from the gradient.
        plus_ratio: LoRA+: the learning rate of B matrices over that of A matrices; none gives all the same.

    Source:
        Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments in blocks of 256); Hayou et al. 2024, arXiv:2402.12354 (LoRA+).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, options = _kind(available_optimizer(name, trained[0].device.type)[0])
    if plus_ratio is None:
        optimizer = kind(_groups(trained, weight_decay), lr=learning_rate, **options)
    else:
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(
            model, kind, lr=learning_rate, loraplus_lr_ratio=plus_ratio, loraplus_weight_decay=weight_decay, **options
        )
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    for group in optimizer.param_groups:
        group[RATIO] = group["lr"] / learning_rate
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group the learning rate of a step, times the group's own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[RATIO]


def parameter_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer's state of a parameter as tensors, where they lie; the rest is made anew by `build_optimizer`."""
    state = optimizer.state.get(parameter, {})
    return {key: torch.as_tensor(value) for key, value in state.items() if key not in _CONSTANT}


def load_parameter_states(optimizer: Any, states: Iterable[tuple[nn.Parameter, dict[str, Tensor]]]) -> None:
    """Put back what `parameter_state` returned for each parameter."""
    places = {id(parameter): (index, group, position) for index, group, position, parameter in _parameters(optimizer)}
    if hasattr(optimizer, "init_state"):
        for parameter, state in states:
            _fill_bitsandbytes(optimizer, parameter, places[id(parameter)][1:], state)
    else:
        indexed = {places[id(parameter)][0]: state for parameter, state in states if state}
        optimizer.load_state_dict({"state": indexed, "param_groups": optimizer.state_dict()["param_groups"]})


def _fill_bitsandbytes(optimizer: Any, parameter: nn.Parameter, place: tuple[int, int], state: dict[str, Tensor]) -> None:
    # bitsandbytes' own load_state_dict would leave paged moments as plain GPU memory
    group, position = place
    optimizer.init_state(optimizer.param_groups[group], parameter, group, position)
    for key, value in state.items():
        if key == "step":
            optimizer.state[parameter][key] = int(value)
        else:
            optimizer.state[parameter][key].copy_(value)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int, int, nn.Parameter]]:
    """Yield (index, group, position in the group, parameter); the index is that of torch's state_dict."""
    index = 0
    for group, entry in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(entry["params"]):
            yield index, group, position, parameter
            index += 1


def _kind(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if name == "adamw":
        return torch.optim.AdamW, {"fused": True}
    import bitsandbytes as bnb

    return {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}[name], {}


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]  # norms, biases and DoRA's magnitudes
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
