"""How much memory this process holds, and has held at most, in host memory and on its GPU."""

import re
import resource
import sys
from pathlib import Path

import psutil

_PROCESS = Path("/proc/self")
_watched = {"peak": 0}


def reset_peak() -> bool:
    """Let `peak_bytes` count from now on; False where the kernel does not let it (then it counts from the process's start)."""
    _watched["peak"] = 0
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the largest resident memory of this process since its start, or since `reset_peak`."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes() -> int:
    """Return what this process and its children hold now and the kernel cannot take back: anonymous and shared memory.

    Pages of files (such as mapped weights) do not count, as the kernel drops them when it needs the room. The largest value
    seen is part of `peaks`.
    """
    held = _status("RssAnon") + _status("RssShmem") or psutil.Process().memory_info().rss
    for child in psutil.Process().children(recursive=True):
        try:
            held += child.memory_full_info().uss
        except psutil.Error:
            continue  # it ended meanwhile, so it holds nothing
    _watched["peak"] = max(_watched["peak"], held)
    return held


def gpu_peak_bytes() -> int:
    """Return the most memory that this process's tensors had reserved on its current GPU; 0 where it uses none."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_reserved() if torch is not None and torch.cuda.is_initialized() else 0


def peaks() -> dict[str, int]:
    """Return this process's `host_peak_bytes` (with its children, where `held_bytes` saw any) and `gpu_peak_bytes`."""
    return {"host_peak_bytes": max(peak_bytes(), _watched["peak"]), "gpu_peak_bytes": gpu_peak_bytes()}


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes; 0 where the system has none."""
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", (_PROCESS / "status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
