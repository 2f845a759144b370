"""Large tensors on a CPU go back to the system when they are freed, so that a worker's memory is what its tensors take."""

import ctypes

_M_MMAP_THRESHOLD = -3
LARGE_BYTES = 256 * 2**10
"""Allocations from this size on are mapped on their own."""


def return_freed_memory() -> bool:
    """Keep glibc from holding freed tensors in its heap, for this process; False where the C library is another one.

    Left alone, glibc raises its threshold up to 32 MiB, and tensors that are kept and tensors that are freed come to lie
    side by side in one heap, whose holes nothing else fits (benchmarks/MEMORY.md). The price is time, as the system
    clears each page anew.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
    except (AttributeError, OSError):
        return False
