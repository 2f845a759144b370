"""Optimizers: what a device runs, LoRA+ rates, 8-bit moments and their exact return from a checkpoint."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from ray_jobs.training.adapters import add_lora
from ray_jobs.training.models import load_model
from ray_jobs.training.optimizers import (
    available_optimizer,
    build_optimizer,
    describe_optimizer,
    load_parameter_states,
    parameter_state,
    set_learning_rate,
)

NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 8))


def take_steps(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(4, 96)).square().mean().backward()
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()
        optimizer.zero_grad()


def test_what_a_cpu_cannot_page_it_keeps_in_8_bits_and_says_so():
    assert available_optimizer("paged_adamw_8bit", "cuda:0") == ("paged_adamw_8bit", "")
    chosen, reason = available_optimizer("paged_adamw_8bit", "cpu")
    assert chosen == "adamw_8bit" and "no GPU" in reason
    assert describe_optimizer("paged_adamw_8bit", "cpu") == f"adamw_8bit ({reason})"
    assert [describe_optimizer(name, "cpu") for name in NAMES[:2]] == NAMES[:2]


def test_matrices_decay_and_vectors_do_not():
    groups = build_optimizer(network(), name="adamw", learning_rate=1e-3, weight_decay=0.1).param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


@pytest.mark.parametrize("name", NAMES)
def test_lora_plus_keeps_its_ratio_at_the_rate_of_each_step(tiny_model, name):
    model = add_lora(load_model(tiny_model, dtype=torch.float32), rank=4, alpha=8, dropout=0.0, targets="all-linear")
    optimizer = build_optimizer(model, name=name, learning_rate=2e-4, weight_decay=0.01, plus_ratio=16)
    set_learning_rate(optimizer, 1e-4)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(parameter) == pytest.approx(16e-4 if "lora_B" in parameter_name else 1e-4)
    assert not rates


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_stops_and_goes_on_ends_in_the_very_same_weights(name):
    model = network()
    take_steps(model, build_optimizer(model, name=name, learning_rate=1e-2, weight_decay=0.1), range(6))
    first = network()
    before = build_optimizer(first, name=name, learning_rate=1e-2, weight_decay=0.1)
    take_steps(first, before, range(3))
    kept = [save(parameter_state(before, parameter)) for parameter in first.parameters()]
    second = network()
    second.load_state_dict(first.state_dict())
    after = build_optimizer(second, name=name, learning_rate=1e-2, weight_decay=0.1)
    load_parameter_states(after, ((parameter, load(state)) for parameter, state in zip(second.parameters(), kept, strict=True)))
    take_steps(second, after, range(3, 6))
    for one, other in zip(model.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_8_bit_moments_take_a_quarter_and_step_like_float32_ones():
    models, size = {}, {}
    for name in NAMES[:2]:
        models[name] = network()
        optimizer = build_optimizer(models[name], name=name, learning_rate=1e-2, weight_decay=0.0)
        take_steps(models[name], optimizer, range(5))
        size[name] = sum(t.numel() * t.element_size() for t in parameter_state(optimizer, models[name][0].weight).values())
    assert size["adamw_8bit"] < 0.27 * size["adamw"]
    start, ends = network()[0].weight, [models[name][0].weight for name in NAMES[:2]]
    assert float((ends[0] - ends[1]).norm() / (ends[0] - start).norm()) < 0.1
