"""What a worker was predicted to hold: carried to it, so that a breach of its limit can name the largest parts."""

from typing import NamedTuple


class JobPlan(NamedTuple):
    """The prediction for each worker of one job; picklable, and free of torch.

    On a worker with a GPU `parts`, `total` and `limit` are about the GPU's memory, `host_*` about its host memory;
    on one without both are about host memory.
    """

    parts: dict[str, int]
    """Bytes by what they hold, largest first."""
    total: int
    """Sum of `parts` in bytes."""
    limit: int
    """What the worker may use, in bytes."""
    smallest_change: str
    """The cheapest change of the config that would need less: one field, as people write it."""
    host_total: int = 0
    """Bytes of host memory beside a GPU; `total` where the worker has none."""
    host_limit: int = 0
    """`[workers] memory` in bytes."""

    @property
    def fits(self) -> bool:
        """Whether both memories suffice."""
        return self.total <= self.limit and self.host_total <= self.host_limit

    @property
    def is_tight(self) -> bool:
        """Whether there is no room for freed memory in the heap, which then holds up to 1.6 times what is alive."""
        return self.host_total > self.host_limit / 1.65

    def largest(self, count: int = 3) -> str:
        """Return the largest parts as "weights 0.54 GiB, activations 0.31 GiB"."""
        return ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in list(self.parts.items())[:count])
