"""Steps and learning rates."""

import math

import pytest

from ray_jobs.core.config import FinetuneSection
from ray_jobs.training.recipe import Recipe


def test_recipe_takes_its_fields_from_a_config_section():
    recipe = Recipe.of(FinetuneSection(learning_rate=1e-3, global_batch_size=4).model_dump(), seed=5)
    assert (recipe.learning_rate, recipe.global_batch_size, recipe.seed) == (1e-3, 4, 5)


@pytest.mark.parametrize(("epochs", "num_rows", "steps"), [(1, 80, 10), (2.5, 80, 25), (0.01, 80, 1)])
def test_epochs_decide_the_steps(epochs, num_rows, steps):
    assert Recipe(epochs=epochs, global_batch_size=8).num_steps(num_rows) == steps


def test_max_steps_wins():
    assert Recipe(epochs=9, max_steps=3).num_steps(800) == 3


def test_cosine_against_its_formula():
    recipe = Recipe(learning_rate=1.0, schedule="cosine", warmup_share=0.1)
    rates = [recipe.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:2] == pytest.approx([1 / 11, 2 / 11])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates == [*sorted(rates[:11]), *sorted(rates[11:], reverse=True)]


def test_linear_falls_evenly_and_constant_stays():
    linear = [Recipe(learning_rate=1.0, schedule="linear", warmup_share=0).learning_rate_at(step, 4) for step in range(4)]
    assert linear == [1.0, 0.75, 0.5, 0.25]
    assert Recipe(learning_rate=1.0, schedule="constant", warmup_share=0).learning_rate_at(3, 4) == 1.0
