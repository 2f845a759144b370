"""The chunked cross-entropy against torch.nn.functional in float64."""

import pytest
import torch
import torch.nn.functional as F

from ray_jobs.training.losses import CHUNK_POSITIONS, head_cross_entropy

H, V = 8, 31


def case(num_positions, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_positions)
    hidden, head, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((num_positions, H), (V, H), (V,)))
    return hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_(), torch.randint(0, V, (num_positions,), generator=generator)


@pytest.mark.parametrize("num_positions", [0, 1, CHUNK_POSITIONS, 2 * CHUNK_POSITIONS + 3])
def test_value_and_gradients_equal_the_dense_ones(num_positions):
    hidden, head, bias, labels = case(num_positions)
    dense = F.cross_entropy(F.linear(hidden, head, bias), labels, reduction="sum")
    chunked = head_cross_entropy(hidden, head, bias, labels)
    torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=1e-12)
    for ours, reference in zip(
        torch.autograd.grad(3 * chunked, (hidden, head, bias)), torch.autograd.grad(3 * dense, (hidden, head, bias)), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient():
    hidden, head, _, labels = case(5)
    head_cross_entropy(hidden, head.detach(), None, labels).backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_the_sum_keeps_float32_where_products_are_bfloat16():
    hidden, head, bias, labels = case(1000, torch.float32)
    dense = F.cross_entropy(F.linear(hidden, head, bias), labels, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        chunked = head_cross_entropy(hidden, head, bias, labels)
    assert chunked.dtype is torch.float32
    torch.testing.assert_close(chunked, dense, rtol=2e-3, atol=0)
    assert {g.dtype for g in torch.autograd.grad(chunked, (hidden, head, bias))} == {torch.float32}


def test_no_gradient_is_formed_where_none_is_wanted():
    hidden, head, bias, labels = case(5)
    with torch.no_grad():
        assert not head_cross_entropy(hidden, head, bias, labels).requires_grad
