"""What a run's targets came to, for the manifest and for people."""

from collections.abc import Mapping
from typing import Any


def told(counts: Mapping[str, float], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's `teacher_targets`: rows computed and read by all workers, the mean worker's wait, and the targets' own facts.

    Args:
        counts: of a run, as `counted` adds them up.
        facts: of the targets at the end.
    """
    return {name.removeprefix("targets_"): value for name, value in counts.items()} | dict(facts)


def targets_in_words(found: Mapping[str, Any]) -> str:
    """Return a line for people; empty where there was neither a cache nor a wait."""
    parts = []
    if rows := found.get("computed", 0) + found.get("read", 0):
        size = f"{found['cached_bytes'] / 2**20:.0f} MiB kept, {found['bytes_per_token']:g} bytes a token"
        parts.append(f"{found['read'] / rows:.0%} of {rows:g} rows read from the cache ({size})")
    if found.get("wait_teacher_s", 0) >= 0.1:
        parts.append(f"waited {found['wait_teacher_s']:.1f} s")
    if "pool_actors" in found:
        parts.append(f"{found['pool_actors']} teacher actors at most, {found['pool_actors_lost']} lost")
    return f"targets: {', '.join(parts)}" if parts else ""
