"""How a space is searched: which points, how many, how many at once."""

import logging
import math
import os
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from tune_spaces.outcomes import Outcomes

Point = dict[str, Any]
TRIAL_BUNDLE = {"CPU": 0, "memory": 2**28}
"""What a trial's own process takes beside its workers: no CPU, or it could starve them."""

QUIET = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else an interrupt would end the sweep as if it were done
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Tune would print tables and tracebacks; what people should see, `on_end` and the returned rows say."""


def search(
    trial: Callable[[Point], None],
    param_space: Point,
    *,
    seed: int,
    num_samples: int,
    max_concurrent: int,
    time_budget_s: float,
    folder: str,
    filesystem: Any = None,
    on_end: Callable[[Point, bool], None],
) -> list[tuple[Point, str]]:
    """Run a trial for each point and return (point, reason) of those started; the reason is "" unless it failed.

    Walks every grid and draws the rest (Bergstra and Bengio 2012, JMLR 13); equal seeds give equal points.

    Args:
        folder: where Ray Tune keeps its own state, within `filesystem` (None: the local one); every node must reach it.
        on_end: called after each trial with its point and whether it failed.
    """
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    outcomes = Outcomes(on_end)
    tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([TRIAL_BUNDLE])),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=BasicVariantGenerator(random_state=seed, max_concurrent=max_concurrent),
            num_samples=num_samples,
            time_budget_s=time_budget_s,
        ),
        run_config=tune.RunConfig(name="ray", storage_path=folder, storage_filesystem=filesystem, verbose=0, callbacks=[outcomes]),
    ).fit()
    return outcomes.rows()


def num_trials(param_space: Point, *, num_samples: int) -> int:
    """Return the number of points: all combinations of the grids, `num_samples` times."""
    return num_samples * math.prod(len(grid) for grid in _grids(param_space))


def repeats(param_space: Point, *, num_samples: int) -> bool:
    """Return whether a point would be tried twice: more samples than one of a space of grids alone."""
    return num_samples > 1 and len(_grids(param_space)) == len(param_space)


def _grids(param_space: Point) -> list[list[Any]]:
    return [domain["grid_search"] for domain in param_space.values() if isinstance(domain, dict)]
