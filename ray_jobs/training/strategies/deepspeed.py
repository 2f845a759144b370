"""DeepSpeed ZeRO: optimizer state (1), gradients (2), parameters (3) in pieces over the workers, or in host memory."""

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums, causal_lm, decoder_layers
from ray_jobs.training.optimizers import set_learning_rate
from ray_jobs.training.postponed import cut_in_parts, fill, is_postponed
from ray_jobs.training.ranks import ensure_group, world_size
from ray_jobs.training.strategies.base import BuildOptimizer, LossModule, State, Strategy, trainable
from ray_jobs.training.strategies.loss_scale import LossScale

BUCKET_NUMBERS = 50_000_000
"""Gradients reduced at once: 0.2 GB in float32, where DeepSpeed's own default takes 2 GB."""
PARAMETERS_GATHERED = 500_000_000
"""Parameters that ZeRO-3 keeps gathered at most: 1 GB in 16 bits, where DeepSpeed's own default allows 2 GB."""


class DeepSpeed(Strategy):
    """A DeepSpeed engine around the loss, which takes the mean over workers and compiles nothing.

    Args:
        zero_stage: 1, 2 or 3.
        offload: none, optimizer, or (stage 3) parameters too.
    """

    def __init__(self, *, zero_stage: int, offload: str):
        self._stage, self._offload = zero_stage, offload

    def prepare(self, module: LossModule, build_optimizer: BuildOptimizer, *, dtype: torch.dtype, max_grad_norm: float) -> None:
        """Take a model that is equal on all workers; stage 3 cuts it into pieces."""
        device = next(module.parameters()).device
        ensure_group(device)
        deepspeed = _import_deepspeed(device)
        module.caches_casts = self._stage < 3  # copies would outlive the gathered parameters
        self._module, self._parameters = module, trainable(module.model)
        self._scale = LossScale() if dtype is torch.float16 else None
        numbers = sum(p.numel() for p in self._parameters.values())
        config = engine_config(self._stage, self._offload, max_grad_norm=max_grad_norm, numbers=numbers)
        optimizer = build_optimizer(module.model)  # while the parameters have their shapes
        if self._stage == 3 and any(map(is_postponed, module.parameters())):
            parts = [*decoder_layers(module.model), causal_lm(module.model).get_input_embeddings(), module]
            cut_in_parts(parts, lambda part: deepspeed.zero.Init(module=part, config_dict_or_path=config))
        fill(module)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)

    def forward(self, batch: Batch, *, last: bool = True) -> LossSums:
        """Return the loss of a micro-batch."""
        return self._engine(batch)

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of a scalar; stages 2 and 3 reduce it at once."""
        if self._scale is not None:
            self._zero.override_loss_scale(self._scale.value)
        self._engine.backward(total)

    def update(self, learning_rate: float) -> float:
        """Clip, step, forget the gradients; return their norm before clipping."""
        set_learning_rate(self._zero, learning_rate)
        self._engine.step()
        overflow = bool(self._zero.overflow)
        if self._scale is not None:
            self._scale.update(overflow=overflow)
        return float("inf") if overflow else float(self._engine.get_global_grad_norm())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained parameters by name, gathered one at a time."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self._parameters.items():
            with GatheredParameters([parameter], enabled=self._stage == 3):
                yield name, parameter.detach()

    def optimizer_state(self) -> Iterator[tuple[str, State]]:
        """Yield the optimizer's state by the parameter's name, gathered one moment at a time."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        state = next(iter(self._zero.optimizer.state.values()), {})
        for name, parameter in self._parameters.items():
            yield name, {key: value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, key) for key, value in state.items()}

    def load_optimizer_state(self, states: Mapping[str, State]) -> None:
        """Put back what `optimizer_state` yielded."""
        first = next(iter(states.values()), {})
        for flat in self._flat_partitions():
            self._zero.optimizer.state[flat] = {
                key: value.clone() if value.ndim == 0 else torch.zeros_like(flat) for key, value in first.items()
            }
        self._link()
        for name, parameter in self._parameters.items():
            for key, value in states.get(name, {}).items():
                if value.ndim:
                    self._put(parameter, key, value)

    def scaler_state(self) -> dict[str, Any]:
        """Return the state of the loss scale."""
        return {} if self._scale is None else self._scale.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Put back a state of the loss scale."""
        if self._scale is not None and state:
            self._scale.load_state_dict(state)

    @property
    def in_pieces(self) -> bool:
        """In stage 3 each worker holds a part of every parameter."""
        return self._stage == 3

    def after_evaluation(self) -> None:
        """Nothing: the engine frees what an evaluation gathered."""

    def release(self) -> None:
        """Take the engine's hooks off the model."""
        self._engine.destroy()

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _flat_partitions(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups

    def _link(self) -> None:
        if self._stage < 3:  # DeepSpeed does so once in the first step, when only the first parameter group has a state
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # the full setter of stage 3 reads past the end where a parameter does not divide by the workers
        piece = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, piece * world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[piece * torch.distributed.get_rank() :][:piece], key)


def engine_config(stage: int, offload: str, *, max_grad_norm: float, numbers: int) -> dict[str, Any]:
    """Return the DeepSpeed config of a run.

    Args:
        numbers: trained parameters, which bound what a bucket needs to hold.
    """
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(BUCKET_NUMBERS, numbers)}
    zero |= {"allgather_bucket_size": min(BUCKET_NUMBERS, numbers)}
    if stage == 3:
        zero |= {"stage3_max_live_parameters": PARAMETERS_GATHERED, "stage3_max_reuse_distance": PARAMETERS_GATHERED}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # each step() ends an accumulation, however many backward() came before
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU optimizer would be compiled here
    }


def _import_deepspeed(device: torch.device) -> Any:
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0) if device.type == "cuda" else os.environ.get("LOCAL_RANK", "0")
    import deepspeed

    # DeepSpeed calls torch by names of before 2.13, once a collective
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # with several workers on one CPU node, DeepSpeed would compile a shared-memory exchange in place of gloo's
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
