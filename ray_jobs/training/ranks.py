"""Which worker this is, and sums over workers; one process alone is rank 0 of 1."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def ensure_group(device: torch.device) -> None:
    """Make a process group of this process alone where there is none: sharded strategies need one."""
    if not _active():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def rank() -> int:
    """Return this worker's number, from 0."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size() if _active() else 1


def sum_over_ranks(values: list[float], device: torch.device | str = "cpu") -> list[float]:
    """Return the values summed over all workers; every worker must call it.

    Args:
        device: where the process group exchanges tensors: cpu for gloo, cuda for nccl.
    """
    if world_size() == 1:
        return values
    total: Tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """Return every worker's value, in the order of ranks; every worker must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
