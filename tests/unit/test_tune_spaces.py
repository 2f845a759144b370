"""Each named space varies real fields of its job, within what the config accepts; a sweep is checked before it starts."""

import functools
import random

import pytest
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants

from ray_jobs.core.config_file import to_toml, validate
from ray_jobs.core.errors import ConfigError
from ray_jobs.tune import check
from tune_spaces import SPACES
from tune_spaces.search import num_trials, repeats


def config(**tune):
    return validate({"run": {"name": "a"}, "tune": tune})


@pytest.fixture(params=SPACES, ids=str)
def space(request):
    job, make = SPACES[request.param]
    return request.param, job, make


def test_every_key_is_a_field_of_the_spaces_job(space):
    _, job, make = space
    tree = config().model_dump()
    for key in make():
        assert key.startswith(f"{job}.")
        functools.reduce(dict.__getitem__, key.split("."), tree)  # KeyError where there is no such field


def test_the_config_accepts_every_point(space):
    _, _, make = space
    random.seed(0)
    points = [point for _, point in generate_variants(make())]
    assert len(points) == num_trials(make(), num_samples=1)
    for point in points:
        tree = {"run": {"name": "a"}}
        for key, value in point.items():
            *sections, field = key.split(".")
            functools.reduce(lambda place, section: place.setdefault(section, {}), sections, tree)[field] = value
        assert to_toml(validate(tree))


def test_every_space_says_where_its_ranges_come_from(space):
    _, _, make = space
    assert "Source:" in make.__doc__


def test_a_grid_is_walked_once_for_each_sample_and_repeats_only_without_a_draw():
    for name, (_, make) in SPACES.items():
        draws = any(isinstance(domain, Domain) for domain in make().values())
        assert num_trials(make(), num_samples=3) == 3 * num_trials(make(), num_samples=1), name
        assert repeats(make(), num_samples=2) is not draws
        assert not repeats(make(), num_samples=1)


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        ({"space": "lora_rnk"}, "did you mean 'lora_rank'?"),
        ({"job": "distill", "space": "lora_rank"}, "'lora_rank' is no space of distill: write one of kd_temperature, soft_targets"),
        ({"metric": "kl_after_nats"}, "is no metric of finetune"),
        ({"num_samples": 2}, "would try each point of 'lora_rank' again: use 1"),
    ],
)
def test_what_cannot_become_a_sweep_is_one_line(tune, expected):
    with pytest.raises(ConfigError) as caught:
        check(config(**tune))
    assert expected in str(caught.value)


def test_the_spaces_named_in_the_config_reference_are_those_there_are():
    description = type(config().tune).model_fields["space"].description
    assert all(name in description for name in SPACES)
