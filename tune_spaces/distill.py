"""What to try when the student learns from the teacher."""

from typing import Any

from ray import tune


def kd_temperature() -> dict[str, Any]:
    """Return a grid over the temperature that softens both distributions.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 4.1, tries 1, 2, 5 and 10 for speech models; its
    section 3 finds that the smaller the student, the lower the best temperature.
    """
    return {"distill.kd_temperature": tune.grid_search([1.0, 2.0, 5.0, 10.0])}


def soft_targets() -> dict[str, Any]:
    """Return temperatures, each with a drawn weight of the labels' cross-entropy; the divergence keeps its weight.

    Source: Hinton et al. 2015, section 2, finds the labels' weight best when it is considerably lower than that
    of the soft targets, and 0.5 in section 4.1: the range ends there.
    """
    return {
        "distill.kd_temperature": tune.grid_search([1.0, 2.0, 5.0, 10.0]),
        "distill.ce_weight": tune.uniform(0.0, 0.5),
    }
