"""Hold this process to its memory limit.

The limit is RLIMIT_DATA: an allocation past it fails inside the process, which then ends with one clear error while
the node and its other workers live on. (RLIMIT_AS counts what is only reserved, and makes Ray's own threads spin.)
"""

import contextlib
import resource
from collections.abc import Iterator

import psutil

from ray_jobs.core.errors import MemoryLimitExceeded
from ray_jobs.core.memory import peak_bytes

_SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "failed to map segment")
_GPU_SIGNS = ("cuda out of memory", "cuda error: out of memory", "alloc_failed")


@contextlib.contextmanager
def memory_limit(limit_bytes: int, *, rank: int = 0) -> Iterator[None]:
    """Hold this process to a limit for as long as the block lasts.

    Args:
        limit_bytes: resident memory it may reach.
        rank: which worker this is, for the message.

    Raises:
        MemoryLimitExceeded: an allocation in the block went past the limit, or past the memory of a GPU.
    """
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = psutil.Process().memory_info()
    unused = max(0, now.data - now.rss)  # thread stacks and the like: reserved, and counted, but never touched
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes + unused, hard))
    try:
        yield
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if isinstance(error, MemoryLimitExceeded) or not (_is_about_gpu(error) or _is_about_memory(error)):
            raise
        if _is_about_gpu(error):
            raise MemoryLimitExceeded(
                f"worker {rank} needs more memory than its GPU has ({str(error).splitlines()[0]}): lower micro_batch_size or "
                "data.max_length, set gradient_checkpointing, or use method qlora"
            ) from error
        raise MemoryLimitExceeded(
            f"worker {rank} needs more than its {limit_bytes / 2**30:.2f} GiB of memory (peak {peak_bytes() / 2**30:.2f} GiB): "
            "raise [workers] memory, lower micro_batch_size or data.max_length, set gradient_checkpointing, or use method qlora"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def _is_about_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


def _is_about_gpu(error: Exception) -> bool:
    return any(sign in str(error).lower() for sign in _GPU_SIGNS)
