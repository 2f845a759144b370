"""How numbers are written for people: shares, p-values, sizes, times."""

import math

NONE = "–"
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def number(value: object, decimals: int | None = None) -> str:
    """Return a number with thousands separators; four significant digits unless `decimals` is given; a dash for None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return NONE if value is None else str(value)
    if not math.isfinite(value):
        return NONE
    if isinstance(value, int) or decimals is not None:
        return _minus(f"{value:z,.{decimals or 0}f}")
    digits = 3 - (math.floor(math.log10(abs(value))) if value else 0)
    return _minus(f"{value:,.{min(max(digits, 0), 6)}f}")


def signed(value: float | None) -> str:
    """Return a number with its sign and four decimals."""
    return NONE if value is None else _minus(f"{value:+.4f}")


def percent(share: float | None, decimals: int = 0) -> str:
    """Return a share of 0 to 1 as percent."""
    return NONE if share is None else f"{100 * share:.{decimals}f}\u202f%"


def p_value(p: float | None) -> str:
    """Return "p = 0.67", or "p < 0.001" below that; no p is rounded to the 0.05 that decides."""
    if p is None:
        return NONE
    if round(p, 3) == 0.05:
        return f"p = {p:.4f}" if round(p, 4) != 0.05 else "p just below 0.05" if p < 0.05 else "p just above 0.05"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def size(num_bytes: float | None) -> str:
    """Return bytes in decimal units: "134.5 MB"."""
    if num_bytes is None:
        return NONE
    for unit, name in SIZES:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.{1 if num_bytes < 100 * unit else 0}f}\u202f{name}"
    return f"{num_bytes:.0f}\u202fB"


def duration(seconds: float | None) -> str:
    """Return "3.2 s", "2 min 03 s" or "1 h 04 min"."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes_left:02d}\u202fmin" if hours else f"{minutes}\u202fmin {rest:02d}\u202fs"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
