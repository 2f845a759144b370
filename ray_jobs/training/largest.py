"""The largest micro-batch and the longest rows that fit in a limit, searched with the memory plan itself."""

from collections.abc import Callable

from ray_jobs.training.memory_plan import Request, predict

LENGTH_STEP = 64
"""Lengths are searched in multiples of this."""
MOST_ROWS = 1024
"""No larger micro-batch is searched."""
GUESSES = 5
"""Plans made for one search, at most."""


def largest_batch(request: Request, limit: int) -> int:
    """Return the most rows of the request's length that fit at once; 0 where not one does."""
    return _largest(lambda rows: _total(request, batch_size=rows), limit, most=MOST_ROWS)


def largest_length(request: Request, limit: int) -> int:
    """Return the longest row that fits alone, in steps of 64 tokens and within the model's positions; 0 where none does."""
    settings = request.settings
    most = settings.get("max_position_embeddings") or settings.get("n_positions") or 131072
    return LENGTH_STEP * _largest(
        lambda steps: _total(request, batch_size=1, length=steps * LENGTH_STEP), limit, most=max(1, most // LENGTH_STEP)
    )


def _total(request: Request, **changes: int) -> int:
    return predict(request._replace(work=request.work._replace(**changes))).total


def _largest(total: Callable[[int], int], limit: int, *, most: int) -> int:
    """Return the largest count up to `most` that was found to be within the limit.

    Totals grow nearly in a straight line, so each guess lies on the line through the two nearest counts known.
    """
    known = {1: total(1)}
    if known[1] > limit:
        return 0
    guess = min(most, 8)
    for _ in range(GUESSES):
        if guess in known:
            break
        known[guess] = total(guess)
        near = sorted(known, key=lambda count: abs(known[count] - limit))[:2]
        low, high = min(near), max(near)
        slope = max(1.0, (known[high] - known[low]) / max(1, high - low))
        guess = min(most, max(1, low + int((limit - known[low]) / slope)))
    return max(count for count, found in known.items() if found <= limit)
