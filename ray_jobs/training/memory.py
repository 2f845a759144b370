"""Hold this process to its memory limit, on the host and on its GPU.

On the host the limit is RLIMIT_DATA: an allocation past it fails inside the process, which then ends with one clear error
while the node and its other workers live on. (RLIMIT_AS counts what is only reserved, and makes Ray's own threads spin.)
What it does not count (children, shared memory) is watched. On the GPU the limit is the caching allocator's.
"""

import contextlib
import resource
from collections.abc import Callable, Iterator

import psutil

from ray_jobs.core.errors import MemoryLimitExceeded
from ray_jobs.core.memory import gpu_peak_bytes, peak_bytes
from ray_jobs.core.sizes import both_units
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.memory_watch import MemoryWatch

OnBreach = Callable[[MemoryLimitExceeded], None]
_SIGNS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "failed to map segment",
    "can't start new thread",
)
_GPU_SIGNS = ("cuda out of memory", "cuda error: out of memory", "alloc_failed")
_LESS = "lower micro_batch_size or data.max_length, set gradient_checkpointing, or use method qlora"


@contextlib.contextmanager
def memory_limit(
    limit_bytes: int,
    *,
    rank: int = 0,
    gpu_limit_bytes: int = 0,
    plan: JobPlan | None = None,
    on_breach: OnBreach | None = None,
    section: str = "[workers]",
) -> Iterator[None]:
    """Hold this process to its limits for as long as the block lasts.

    Args:
        limit_bytes: host memory it may hold.
        rank: which worker this is, for the message.
        gpu_limit_bytes: what its tensors may take on a GPU, for the message; `hold_gpu` sets it.
        plan: what was predicted, for the message.
        on_breach: given the error when the process passes its limit together with its children and shared memory, which no
            allocation notices; called from a thread, so it ends the process or asks it to end. None: not watched.
        section: of the config that sets the limit, for the message.

    Raises:
        MemoryLimitExceeded: an allocation in the block went past a limit, or past the memory of a GPU.
    """
    with _watch(limit_bytes, rank, plan, on_breach, section):  # first: below a limit that is too low even a thread cannot start
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
                raise MemoryLimitExceeded(_gpu_breach(rank, gpu_limit_bytes, str(error).splitlines()[0], plan)) from error
            raise MemoryLimitExceeded(_host_breach(rank, limit_bytes, peak_bytes(), plan, section=section)) from error
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def hold_gpu(device: str, limit_bytes: int) -> None:
    """Let tensors of this process take no more than `limit_bytes` of a GPU; nothing to do on another device.

    The CUDA context and the libraries' own buffers come on top, as nothing holds a process to those.
    Source: docs.pytorch.org, torch.cuda.set_per_process_memory_fraction.
    """
    if not device.startswith("cuda"):
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)


def _watch(
    limit_bytes: int, rank: int, plan: JobPlan | None, on_breach: OnBreach | None, section: str
) -> contextlib.AbstractContextManager[object]:
    if on_breach is None:
        return contextlib.nullcontext()
    tell = on_breach

    def breached(held: int) -> None:
        others = "with its child processes and shared memory "
        tell(MemoryLimitExceeded(_host_breach(rank, limit_bytes, held, plan, section=section, with_others=others)))

    return MemoryWatch(limit_bytes, on_breach=breached)


def _host_breach(rank: int, limit_bytes: int, peak: int, plan: JobPlan | None, *, section: str, with_others: str = "") -> str:
    return (
        f"worker {rank} {with_others}needs more than its {both_units(limit_bytes)} of memory (peak {both_units(peak)}){_planned(plan)}: "
        f"raise {section} memory, or {plan.smallest_change if plan else _LESS}"
    )


def _gpu_breach(rank: int, limit_bytes: int, reason: str, plan: JobPlan | None) -> str:
    limit = f"the {both_units(limit_bytes)} it may use of its GPU" if limit_bytes else "its GPU has"
    more = "raise [workers] gpu_memory where the GPU has more, or " if limit_bytes else ""
    return (
        f"worker {rank} needs more memory than {limit} (peak {both_units(gpu_peak_bytes())}; {reason}){_planned(plan)}: "
        f"{more}{plan.smallest_change if plan else _LESS}"
    )


def _planned(plan: JobPlan | None) -> str:
    return f", planned were {plan.total / 2**30:.2f} GiB, most of it {plan.largest()}" if plan else ""


def _is_about_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)


def _is_about_gpu(error: Exception) -> bool:
    return any(sign in str(error).lower() for sign in _GPU_SIGNS)
