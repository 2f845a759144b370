"""How a strategy divides the memory of a job among its workers: whole copies, ZeRO stages 1 to 3, FSDP shards, offload to the host."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedModel

from ray_jobs.training.skeletons import num_parameters

if TYPE_CHECKING:
    from ray_jobs.training.memory_plan import Memory

ZERO_BUCKET_NUMBERS = 50_000_000
"""Gradients that DeepSpeed reduces at once (strategies/deepspeed.py)."""
ZERO_LIVE_NUMBERS = 550_000_000
"""Parameters that ZeRO-3 keeps gathered at most, those fetched ahead included; one larger than that is gathered alone."""
_FLOAT32 = 4


class Sharding(NamedTuple):
    """The config's [workers], as far as memory goes."""

    strategy: str = "ddp"
    """ddp, fsdp or deepspeed."""
    workers: int = 1
    zero_stage: int = 2
    offload: str = "none"
    """none, optimizer or parameters; means nothing on a worker without a GPU."""

    @property
    def name(self) -> str:
        """The strategy, for people."""
        kind = {"ddp": "DDP", "fsdp": "FSDP"}.get(self.strategy, f"ZeRO-{self.zero_stage}")
        return kind if self.offload == "none" else f"{kind}, {self.offload} offloaded"

    @property
    def cuts_parameters(self) -> bool:
        """Whether each worker holds only a piece of each parameter."""
        return self.strategy == "fsdp" or (self.strategy == "deepspeed" and self.zero_stage == 3)


class Trained(NamedTuple):
    """What training changes."""

    numbers: int
    whole: bool
    """All of the model, rather than an adapter on it."""


def shard(
    memory: "Memory",
    sharding: Sharding,
    *,
    model: PreTrainedModel,
    trained: Trained,
    weight_dtype: torch.dtype,
    product_dtype: torch.dtype,
) -> "Memory":
    """Return the parts of one worker of several, from those of one worker alone.

    Args:
        memory: weights, adapter, gradients and optimizer of a worker that shares with nobody.
        model: shapes of the model that is trained.
        weight_dtype: type of the weights that are not quantized.
        product_dtype: type of matrix products.

    Source:
        Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Ren et al. 2021, arXiv:2101.06840 (offload).
    """
    if sharding.strategy == "ddp":
        return memory._replace(buckets=trained.numbers * _FLOAT32 if sharding.workers > 1 else 0)
    count = sharding.workers
    if sharding.strategy == "fsdp":
        working_set = _fsdp_working_set(memory, model, trained, weight_dtype, product_dtype)
        memory = _parameters_over(memory, count)
        return memory._replace(gradients=memory.gradients // count, optimizer=memory.optimizer // count, **working_set)
    master = trained.numbers * _FLOAT32  # DeepSpeed steps on a float32 copy of the parameters
    bucket = min(ZERO_BUCKET_NUMBERS, trained.numbers) * _FLOAT32
    memory = memory._replace(optimizer=(memory.optimizer + master) // count, buckets=bucket)
    if sharding.zero_stage >= 2:
        memory = memory._replace(gradients=memory.gradients // count)
    if sharding.zero_stage == 3:
        memory = _parameters_over(memory, count)
        largest = max(parameter.numel() for parameter in model.parameters())
        gathered = min(max(ZERO_LIVE_NUMBERS, largest), num_parameters(model)) * weight_dtype.itemsize
        memory = memory._replace(gathered=gathered)
    return memory


def offload(memory: "Memory", sharding: Sharding) -> "Memory":
    """Return the parts with those that the strategy keeps in host memory moved there; for workers with a GPU."""
    if sharding.offload == "none":
        return memory
    moved = memory.optimizer + (memory.gradients if sharding.zero_stage >= 2 else 0)
    memory = memory._replace(optimizer=0, gradients=0 if sharding.zero_stage >= 2 else memory.gradients)
    if sharding.offload == "parameters":
        moved += memory.weights + memory.adapter
        memory = memory._replace(weights=0, adapter=0)
    return memory._replace(offloaded=memory.offloaded + moved)


def _parameters_over(memory: "Memory", count: int) -> "Memory":
    return memory._replace(weights=memory.weights // count, adapter=memory.adapter // count)


def _fsdp_working_set(
    memory: "Memory", model: PreTrainedModel, trained: Trained, weight_dtype: torch.dtype, product_dtype: torch.dtype
) -> dict[str, int]:
    """Two layers gathered (one at work, one fetched ahead), the embeddings and the head all the time, one layer's gradients."""
    layers = model.config.num_hidden_layers
    body = sum(parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name or ".h." in name)
    root = (num_parameters(model) - body) * weight_dtype.itemsize
    layer = body * product_dtype.itemsize // layers if trained.whole else (memory.weights - root + memory.adapter) // layers
    gradients = (body if trained.whole else trained.numbers) * _FLOAT32 // layers
    return {"gathered": root + 2 * layer, "buckets": gradients}
