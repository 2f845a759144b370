"""The largest micro-batch and the longest rows that fit in a limit, searched with the memory plan itself."""

from collections.abc import Callable

from ray_jobs.training.memory_plan import Request, predict

LENGTH_STEP = 64
"""Lengths are searched in multiples of this."""
MOST_ROWS = 1024
"""No larger micro-batch is searched."""
GUESSES = 4
"""Plans made for one search, at most, beside the first."""
ROWS = 8
"""A second micro-batch, whose plan tells what a row and a token take."""


def largest_batch(request: Request, limit: int) -> int:
    """Return the most rows of the request's length that fit at once; 0 where not one does."""
    return _largest(lambda rows: _total(request, batch_size=rows), limit, start=1, guess=ROWS, most=MOST_ROWS)


def largest_length(request: Request, limit: int) -> int:
    """Return the longest row that fits alone, in steps of 64 tokens and within the model's positions; 0 where none does."""
    settings = request.settings
    most = settings.get("max_position_embeddings") or settings.get("n_positions") or 131072
    start = max(1, request.work.length // LENGTH_STEP)
    row = (_total(request, batch_size=ROWS) - _total(request, batch_size=1)) / (ROWS - 1)
    guess = start + (limit - _total(request, batch_size=1)) / max(1.0, row) * start
    return LENGTH_STEP * _largest(
        lambda steps: _total(request, batch_size=1, length=steps * LENGTH_STEP),
        limit,
        start=start,
        guess=int(guess),
        most=max(1, most // LENGTH_STEP),
    )


def _total(request: Request, **changes: int) -> int:
    return predict(request._replace(work=request.work._replace(**changes))).total


def _largest(total: Callable[[int], int], limit: int, *, start: int, guess: int, most: int) -> int:
    """Return the largest count up to `most` that was found to be within the limit, or 0.

    Totals grow nearly in a straight line, so each further guess lies on the line through the two nearest counts known.

    Args:
        start: a first count.
        guess: a second.
    """
    start = min(start, most)
    known = {start: total(start)}
    guess = min(most, max(1, guess))
    for _ in range(GUESSES):
        if guess in known:
            break
        known[guess] = total(guess)
        near = sorted(known, key=lambda count: abs(known[count] - limit))[:2]
        low, high = min(near), max(near)
        slope = max(1.0, (known[high] - known[low]) / max(1, high - low))
        guess = min(most, max(1, low + int((limit - known[low]) / slope)))
    return max((count for count, found in known.items() if found <= limit), default=0)
