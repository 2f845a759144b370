"""What to try when the teacher learns the course."""

from typing import Any

from ray import tune


def lora_rank() -> dict[str, Any]:
    """Return a grid over the rank of the adapters; alpha stays as the config has it.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 7.2, tries ranks 1 to 64 and finds small ones enough where
    the task is near the base model's own; its section 4.1 keeps alpha while the rank varies, since the scale
    alpha / rank makes a new learning rate unnecessary.
    """
    return {"finetune.lora.rank": tune.grid_search([4, 16, 64])}


def lora_rank_and_learning_rate() -> dict[str, Any]:
    """Return ranks, each with a drawn learning rate; alpha stays, as it only scales the learning rate.

    Source: Dettmers et al. 2023 (arXiv:2305.14314), appendix A, searches ranks from 8 up with alpha fixed;
    Hu et al. 2021, appendix D, trains its language models at 2e-4: the range is a factor of five around it.
    """
    return {
        "finetune.lora.rank": tune.grid_search([8, 16, 32, 64]),
        "finetune.learning_rate": tune.loguniform(4e-5, 1e-3),
    }
