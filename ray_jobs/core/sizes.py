"""Sizes as people write them, and as they read them: 16GB and 16GiB differ by 7%."""

import re

from ray_jobs.core.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as "16GiB" or "500 MB" names; GB is 10^9, GiB is 2^30.

    Raises:
        ConfigError: no number with one of the units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text)
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"size {text!r} is not understood: write a number and a unit of {', '.join(_UNITS)}, like 16GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def both_units(size: float) -> str:
    """Return a size as "14.90 GiB (16.00 GB)", a small one as "5.00 MiB (5.24 MB)"."""
    if size < 0.1 * 2**30:
        return f"{size / 2**20:.2f} MiB ({size / 10**6:.2f} MB)"
    return f"{size / 2**30:.2f} GiB ({size / 10**9:.2f} GB)"
