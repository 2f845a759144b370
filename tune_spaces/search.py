"""How a space is searched: which points, how many, how many at once."""

import math
from typing import Any

from ray.tune.search.basic_variant import BasicVariantGenerator


def grid_and_random(*, seed: int) -> BasicVariantGenerator:
    """Return the search that walks every grid and draws the rest; equal seeds give equal points.

    Source: Bergstra and Bengio 2012 (JMLR 13), on drawing rather than gridding the continuous ranges.
    """
    return BasicVariantGenerator(random_state=seed)


def num_trials(param_space: dict[str, Any], *, num_samples: int) -> int:
    """Return the number of points: all combinations of the grids, `num_samples` times."""
    return num_samples * math.prod(len(grid) for grid in _grids(param_space))


def repeats(param_space: dict[str, Any], *, num_samples: int) -> bool:
    """Return whether a point would be tried twice: more samples than one of a space of grids alone."""
    return num_samples > 1 and len(_grids(param_space)) == len(param_space)


def _grids(param_space: dict[str, Any]) -> list[list[Any]]:
    return [domain["grid_search"] for domain in param_space.values() if isinstance(domain, dict)]
