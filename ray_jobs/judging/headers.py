"""What the headers of a reply tell about the provider's limits, in OpenAI's names and in Anthropic's."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Told(NamedTuple):
    """Limits a minute, and how long to wait; None where nothing is told."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    wait_s: float | None = None


def read_headers(headers: Mapping[str, str], *, now: datetime | None = None) -> Told:
    """Return what the headers tell.

    The time to wait is that of retry-after-ms, else of Retry-After in seconds or as a date, else until what is used up is
    there again. Source: OpenAI, "Rate limits in headers"; Anthropic, "Rate limits: response headers"; RFC 9110, 10.2.3.

    Args:
        headers: case-insensitive.
        now: for tests.
    """
    clock = now or datetime.now(UTC)
    tokens = _first(headers, "x-ratelimit-limit-tokens", "anthropic-ratelimit-tokens-limit")
    if tokens is None:
        parts = [_number(headers.get(f"anthropic-ratelimit-{side}-tokens-limit")) for side in ("input", "output")]
        tokens = sum(part for part in parts if part) or None
    requests = _first(headers, "x-ratelimit-limit-requests", "anthropic-ratelimit-requests-limit")
    return Told(requests, tokens, _wait(headers, clock))


def _wait(headers: Mapping[str, str], now: datetime) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    told = _until(headers.get("retry-after", ""), now)
    if told is not None:
        return told
    resets = []
    for kind in ("requests", "tokens"):
        for remaining, reset in (
            (f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}"),
            (f"anthropic-ratelimit-{kind}-remaining", f"anthropic-ratelimit-{kind}-reset"),
        ):
            if _number(headers.get(remaining)) == 0:
                resets.append(_until(headers.get(reset, ""), now))
    return max((reset for reset in resets if reset is not None), default=None)


def _until(text: str, now: datetime) -> float | None:
    """Return seconds from a number, a duration like 6m0s, an ISO date or an HTTP date."""
    number = _number(text)
    if number is not None:
        return number
    parts = _DURATION.findall(text)
    if parts and "".join(map("".join, parts)) == text.strip():
        return sum(float(amount) * _UNIT_S[unit] for amount, unit in parts)
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = parse(text)
        except (ValueError, TypeError):
            continue
        return max((moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds(), 0.0)
    return None


def _first(headers: Mapping[str, str], *names: str) -> float | None:
    return next((value for value in (_number(headers.get(name)) for name in names) if value), None)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
