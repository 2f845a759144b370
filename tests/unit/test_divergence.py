"""The loss of distillation against torch.nn.functional in float64, its properties, and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from ray_jobs.distillation.divergence import forward_kl, fused_head_loss

N, H_STUDENT, H_TEACHER, V = 23, 8, 12, 101


@pytest.fixture
def case():
    torch.manual_seed(0)
    wide = {"dtype": torch.float64}
    student = torch.randn(N, H_STUDENT, **wide).requires_grad_()
    head = torch.randn(V, H_STUDENT, **wide).requires_grad_()
    return student, head, torch.randn(N, H_TEACHER, **wide), torch.randn(V, H_TEACHER, **wide), torch.randint(0, V, (N,))


def dense(case, temperature, kd_weight, ce_weight):
    student, head, teacher, teacher_head, labels = case
    log_q = F.log_softmax(student @ head.T / temperature, -1)
    log_p = F.log_softmax(teacher @ teacher_head.T / temperature, -1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2
    ce = F.cross_entropy(student @ head.T, labels, reduction="sum")
    return kd_weight * kl + ce_weight * ce, kl, ce


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(0.9, 0.1), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("chunk_positions", [1, 5, 23, 64])
def test_fused_loss_and_gradients_equal_the_dense_float64_reference(case, temperature, kd_weight, ce_weight, chunk_positions):
    total, kl, ce = dense(case, temperature, kd_weight, ce_weight)
    expected = torch.autograd.grad(total, case[:2])
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight}
    loss = fused_head_loss(*case, temperature=temperature, chunk_positions=chunk_positions, **weights)
    for seen, want in zip(loss, (total, kl, ce), strict=True):
        torch.testing.assert_close(seen, want, rtol=1e-10, atol=1e-10)
    for seen, want in zip(torch.autograd.grad(loss.total, case[:2]), expected, strict=True):
        torch.testing.assert_close(seen, want, rtol=1e-9, atol=1e-9)


def test_dense_form_equals_kl_div_per_position(case):
    student, head, teacher, teacher_head, _ = case
    logits, target = student @ head.T, teacher @ teacher_head.T
    want = F.kl_div(F.log_softmax(logits / 3, -1), F.softmax(target / 3, -1), reduction="none").sum(-1) * 9
    torch.testing.assert_close(forward_kl(logits, target, temperature=3.0), want)


def test_float32_stays_close_to_float64(case):
    narrow = tuple(t.float() if t.is_floating_point() else t for t in case)
    options = {"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.1}
    wide, seen = fused_head_loss(*case, **options), fused_head_loss(*narrow, **options)
    for a, b in zip(seen, wide, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_divergence_is_never_negative_and_zero_only_where_equal(case):
    student, head, teacher, teacher_head, labels = case
    assert (forward_kl(student @ head.T, teacher @ teacher_head.T, temperature=2.0) > 0).all()
    same = fused_head_loss(teacher, teacher_head, teacher, teacher_head, labels, temperature=2.0, kd_weight=1, ce_weight=0)
    assert same.kl == 0
    shifted = teacher @ teacher_head.T + 7.0
    assert forward_kl(shifted, teacher @ teacher_head.T, temperature=2.0).abs().max() < 1e-12


def test_high_temperature_limit_is_the_squared_distance_of_centred_logits(case):
    student, head, teacher, teacher_head, _ = case
    gap = student @ head.T - teacher @ teacher_head.T
    limit = (gap - gap.mean(-1, keepdim=True)).square().mean(-1) / 2
    seen = forward_kl(student @ head.T, teacher @ teacher_head.T, temperature=1e4)
    torch.testing.assert_close(seen, limit, rtol=1e-2, atol=0)


def test_low_temperature_limit_compares_the_winners():
    teacher = torch.tensor([[5.0, 1.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[2.0, 3.0, 0.0]], dtype=torch.float64)
    temperature = 1e-3
    # T * KL tends to the margin by which the student prefers another token than the teacher's first.
    seen = forward_kl(student, teacher, temperature=temperature) / temperature
    assert math.isclose(seen.item(), 1.0, rel_tol=1e-6)


def test_squared_temperature_is_in_the_gradient(case):
    def norm(temperature):
        loss = fused_head_loss(*case, temperature=temperature, kd_weight=1.0, ce_weight=0.0)
        return torch.autograd.grad(loss.total, case[0])[0].norm().item()

    assert 0.5 < norm(200.0) / norm(100.0) < 2.0  # without the square it would fall by four


def test_frozen_head_gets_no_gradient_and_changes_nothing_else(case):
    student, head, *rest = case
    options = {"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.1}
    free = torch.autograd.grad(fused_head_loss(student, head, *rest, **options).total, student)[0]
    frozen = fused_head_loss(student, head.detach(), *rest, **options)
    torch.testing.assert_close(torch.autograd.grad(frozen.total, student)[0], free)


def test_gradient_scales_with_what_follows(case):
    options = {"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.1}
    once = torch.autograd.grad(fused_head_loss(*case, **options).total, case[:2])
    tenth = torch.autograd.grad(fused_head_loss(*case, **options).total / 10, case[:2])
    for a, b in zip(once, tenth, strict=True):
        torch.testing.assert_close(a / 10, b)


def test_no_valid_position_is_a_loss_of_zero_with_zero_gradient(case):
    student, head, teacher, teacher_head, labels = case
    loss = fused_head_loss(student[:0], head, teacher[:0], teacher_head, labels[:0], temperature=2.0, kd_weight=0.9, ce_weight=0.1)
    assert loss.total == 0
    assert (torch.autograd.grad(loss.total, head)[0] == 0).all()


def test_sums_over_splits_equal_the_whole(case):
    student, head, teacher, teacher_head, labels = case
    options = {"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.1}
    whole = fused_head_loss(*case, **options).total
    halves = [fused_head_loss(student[s], head, teacher[s], teacher_head, labels[s], **options).total for s in (slice(0, 9), slice(9, N))]
    torch.testing.assert_close(sum(halves), whole)


def test_autocast_projects_in_its_type_and_sums_in_float32(case):
    narrow = [t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in case]
    options = {"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_head_loss(*narrow, **options)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), fused_head_loss(*case, **options).total, rtol=2e-2, atol=0)
    assert torch.autograd.grad(loss.total, narrow[1])[0].dtype == torch.float32
