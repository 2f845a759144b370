"""How much memory this process has held at most."""

import re
import resource
from pathlib import Path

_PROCESS = Path("/proc/self")


def reset_peak() -> bool:
    """Let `peak_bytes` count from now on; False where the kernel does not let it (then it counts from the process's start)."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the largest resident memory of this process since its start, or since `reset_peak`."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text())
    except OSError:
        found = None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
