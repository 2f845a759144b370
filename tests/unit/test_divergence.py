"""Every divergence against its dense form in float64, its properties and limits, and what the fused head keeps in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.dense import dense_divergence, dense_head_loss, dense_top_k_loss
from ray_jobs.distillation.divergence import Divergence, fused_head_loss, fused_top_k_loss

N, H_STUDENT, H_TEACHER, V, K = 23, 8, 12, 101, 7
KINDS = ["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"]
MIXED = {"kd_weight": 0.9, "ce_weight": 0.1}
KL = {"divergence": Divergence(temperature=2.0), **MIXED}


def make_case(seed=0, rows=N, dtype=torch.float64):
    torch.manual_seed(seed)
    student, head = torch.randn(rows, H_STUDENT, dtype=dtype), torch.randn(V, H_STUDENT, dtype=dtype)
    teacher, teacher_head = torch.randn(rows, H_TEACHER, dtype=dtype), torch.randn(V, H_TEACHER, dtype=dtype)
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, torch.randint(0, V, (rows,))


@pytest.fixture
def case():
    return make_case()


def test_the_mean_over_positions_is_not_rounded_to_the_type_of_the_weights():
    found = []
    for positions in (1, 300):
        student, head, teacher, teacher_head, labels = make_case(rows=300, dtype=torch.bfloat16)
        total = fused_head_loss(student, head, teacher, teacher_head, labels, **KL).total
        (total / positions).backward()
        found.append([student.grad.double(), head.grad.double()])
    for whole, mean in zip(*found, strict=True):
        share = float((mean * whole).sum() / whole.square().sum()) * 300
        assert share == pytest.approx(1, abs=5e-4)  # 1 / 300 is 0.2% off in bfloat16; each element's own rounding averages out


@pytest.fixture
def logits(case):
    student, head, teacher, teacher_head, _ = case
    return (student @ head.T).detach().requires_grad_(), teacher @ teacher_head.T


def top_k(case, temperature, k=K):
    log_p = torch.log_softmax(case[2] @ case[3].T / temperature, -1)
    kept = log_p.topk(k)
    tail = torch.log1p(-kept.values.exp().sum(-1))
    return kept.indices, kept.values, tail


def assert_same(fused, dense, case, tolerance=1e-9):
    for seen, want in zip(fused, dense, strict=True):
        torch.testing.assert_close(seen, want, rtol=tolerance, atol=tolerance)
    for seen, want in zip(torch.autograd.grad(fused.total, case[:2]), torch.autograd.grad(dense.total, case[:2]), strict=True):
        torch.testing.assert_close(seen, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_dense_form_in_float64(kind, temperature, seed):
    case = make_case(seed)
    chosen = Divergence(kind, beta=0.3, skew=0.2, temperature=temperature)
    for rows in (slice(0), slice(1), slice(N)):  # no, one and all valid positions
        part = (case[0][rows], case[1], case[2][rows], case[3], case[4][rows])
        for weights in (MIXED, {"kd_weight": 1.0, "ce_weight": 0.0}):
            options = {"divergence": chosen, **weights}
            assert_same(fused_head_loss(*part, **options, chunk_positions=9), dense_head_loss(*part, **options), case)
        targets = (case[0][rows], case[1], *(each[rows] for each in top_k(case, temperature)), case[4][rows])
        options = {"divergence": chosen, **MIXED}
        assert_same(fused_top_k_loss(*targets, **options, chunk_positions=9), dense_top_k_loss(*targets, **options), case)


def test_the_dense_forms_equal_torchs_own_where_it_has_them(logits):
    student, teacher = logits
    log_q, log_p = torch.log_softmax(student / 3, -1), torch.log_softmax(teacher / 3, -1)
    want = {
        "forward_kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * 9,
        "reverse_kl": F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * 9,
        "total_variation": F.l1_loss(log_q.exp(), log_p.exp(), reduction="none").sum(-1) / 2 * 3,
    }
    middle = ((log_q.exp() + log_p.exp()) / 2).log()
    halves = (F.kl_div(middle, each, reduction="none", log_target=True).sum(-1) for each in (log_q, log_p))
    want["jsd"] = sum(halves) / 2 * 9
    for kind, expected in want.items():
        torch.testing.assert_close(dense_divergence(student, teacher, Divergence(kind, temperature=3.0)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_of_the_dense_form_is_right(kind, logits):
    student, teacher = (each[:2, :9].detach() for each in logits)
    chosen = Divergence(kind, beta=0.3, temperature=2.0)
    assert torch.autograd.gradcheck(lambda x: dense_divergence(x, teacher, chosen), student.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_above_0_and_0_where_both_are_equal_up_to_a_shift(kind, case, logits):
    student, teacher = logits
    assert (dense_divergence(student, teacher, Divergence(kind)) > 0).all()
    assert dense_divergence(teacher + 7.0, teacher, Divergence(kind)).abs().max() < 1e-12
    hidden, head, labels = case[2].clone().requires_grad_(), case[3], case[4]
    same = fused_head_loss(hidden, head, hidden, head, labels, divergence=Divergence(kind), kd_weight=1, ce_weight=0)
    assert same.divergence.abs() < 1e-12
    assert torch.autograd.grad(same.total, hidden)[0].abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_without_common_tokens_are_finite_and_bounded_as_they_should(kind):
    student, teacher = torch.eye(4)[:2] * 400, torch.eye(4)[2:] * 400
    for head in (torch.eye(4), torch.eye(4, dtype=torch.float64)):
        pair = [each.to(head.dtype).requires_grad_() for each in (student, teacher)]
        options = {"divergence": Divergence(kind), "kd_weight": 1.0, "ce_weight": 0.0}
        loss = fused_head_loss(pair[0], head, pair[1], head, torch.zeros(2, dtype=torch.long), **options)
        bound = {"jsd": 2 * 0.6931472, "skewed_kl": 2 * 2.3025851, "total_variation": 2.0}.get(kind, 800.0)
        assert loss.divergence.item() == pytest.approx(bound, rel=1e-5)
        assert torch.autograd.grad(loss.total, pair[0])[0].isfinite().all()


def test_total_variation_lies_between_0_and_1(logits):
    seen = dense_divergence(*logits, Divergence("total_variation"))
    assert ((seen > 0) & (seen < 1)).all()


def test_jsd_tends_to_forward_and_to_reverse_kl(logits):
    for beta, kind, share in ((1e-10, "forward_kl", 1e-10), (1 - 1e-10, "reverse_kl", 1e-10)):
        seen = dense_divergence(*logits, Divergence("jsd", beta=beta)) / share
        torch.testing.assert_close(seen, dense_divergence(*logits, Divergence(kind)), rtol=2e-2, atol=0)


def test_skewed_kl_tends_to_forward_kl_and_to_0(logits):
    seen = dense_divergence(*logits, Divergence("skewed_kl", skew=1e-13))
    torch.testing.assert_close(seen, dense_divergence(*logits, Divergence()), rtol=1e-3, atol=0)
    assert dense_divergence(*logits, Divergence("skewed_kl", skew=1 - 1e-9)).max() < 1e-8


HIGH = {"forward_kl": 1.0, "reverse_kl": 1.0, "jsd": 0.3 * 0.7, "skewed_kl": 0.8**2}
"""Of half the squared distance of centred logits, in the limit of high temperatures."""


@pytest.mark.parametrize("kind", KINDS)
def test_high_temperature_compares_centred_logits(kind, case, logits):
    student, teacher = logits
    gap = student.detach() - teacher
    centred = gap - gap.mean(-1, keepdim=True)
    limit = centred.abs().mean(-1) / 2 if kind == "total_variation" else HIGH[kind] * centred.square().mean(-1) / 2
    seen = dense_divergence(student, teacher, Divergence(kind, beta=0.3, skew=0.2, temperature=1e4))
    torch.testing.assert_close(seen, limit, rtol=1e-2, atol=0)
    if kind != "total_variation":
        gradient = torch.autograd.grad(seen.sum(), student)[0]
        torch.testing.assert_close(gradient, HIGH[kind] * centred / V, rtol=1e-2, atol=1e-2 * centred.abs().max().item() / V)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_keeps_its_size_when_the_temperature_changes(kind, case):
    def norm(temperature):
        loss = fused_head_loss(*case, divergence=Divergence(kind, temperature=temperature), kd_weight=1.0, ce_weight=0.0)
        return torch.autograd.grad(loss.total, case[0])[0].norm().item()

    assert norm(200.0) / norm(100.0) == pytest.approx(1.0, rel=0.1)


def test_low_temperature_limit_compares_the_winners():
    teacher, student = (torch.tensor([values], dtype=torch.float64) for values in ([5.0, 1.0, 0.0], [2.0, 3.0, 0.0]))
    # T * KL tends to the margin by which the student prefers another token than the teacher's first
    seen = dense_divergence(student, teacher, Divergence(temperature=1e-3)) / 1e-3
    assert seen.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_never_show_more_than_the_whole_and_all_but_one_token_show_it_all(kind, case):
    options = {"divergence": Divergence(kind, temperature=2.0), "kd_weight": 1.0, "ce_weight": 0.0}
    whole = fused_head_loss(*case, **options).divergence
    seen = [fused_top_k_loss(*case[:2], *top_k(case, 2.0, k), case[4], **options).divergence for k in (1, 10, V - 1)]
    assert seen[0] < seen[1] < whole
    torch.testing.assert_close(seen[2], whole, rtol=1e-6, atol=0)


def test_keeping_every_token_is_refused(case):
    with pytest.raises(ConfigError, match=r"keep 101 of 101 tokens: keep fewer"):
        fused_top_k_loss(*case[:2], *top_k(case, 1.0, V), case[4], **KL)


def test_a_tail_of_nothing_stays_finite(case):
    ids, log_p, _ = top_k(case, 2.0)
    loss = fused_top_k_loss(*case[:2], ids, log_p, torch.full((N,), float("-inf")), case[4], **KL)
    assert all(grad.isfinite().all() for grad in (loss.total, *torch.autograd.grad(loss.total, case[:2])))


def test_padded_rows_of_either_head_count_nothing(case):
    student, head, teacher, teacher_head, labels = case
    want = torch.autograd.grad(fused_head_loss(*case, **KL).total, case[:2])
    wide = torch.cat([head.detach(), torch.full((3, H_STUDENT), 9.0)]).requires_grad_()
    wider = torch.cat([teacher_head, torch.full((5, H_TEACHER), 9.0)])
    loss = fused_head_loss(student, wide, teacher, wider, labels, num_tokens=V, **KL)
    seen = torch.autograd.grad(loss.total, (student, wide))
    torch.testing.assert_close(seen[0], want[0])
    torch.testing.assert_close(seen[1], torch.cat([want[1], torch.zeros(3, H_STUDENT)]))


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else(case):
    student, head, *rest = case
    free = torch.autograd.grad(fused_head_loss(student, head, *rest, **KL).total, student)[0]
    frozen = fused_head_loss(student, head.detach(), *rest, **KL)
    torch.testing.assert_close(torch.autograd.grad(frozen.total, student)[0], free)


def test_the_gradient_scales_with_what_follows(case):
    once, tenth = (torch.autograd.grad(fused_head_loss(*case, **KL).total * factor, case[:2]) for factor in (1.0, 0.1))
    for a, b in zip(once, tenth, strict=True):
        torch.testing.assert_close(a / 10, b)


def test_a_second_backward_pass_is_refused_rather_than_scaled_twice(case):
    total = fused_head_loss(*case, **KL).total
    (total * 0.5).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total * 0.5).backward()


def narrow(case):
    return tuple(each.detach().float().requires_grad_(each.requires_grad) if each.is_floating_point() else each for each in case)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_close_to_float64(kind, case):
    options = {"divergence": Divergence(kind, temperature=2.0), **MIXED}
    small, wide = fused_head_loss(*narrow(case), **options), fused_head_loss(*case, **options)
    for a, b in zip(small[:3], wide[:3], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_projects_in_its_type_and_sums_in_float32(kind, case):
    options = {"divergence": Divergence(kind, temperature=2.0), **MIXED}
    small = narrow(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_head_loss(*small, **options)
    assert loss.total.dtype == torch.float32
    wide = fused_head_loss(*case, **options)
    torch.testing.assert_close(loss.total.double(), wide.total, rtol=2e-2, atol=0)
    head = torch.autograd.grad(loss.total, small[1])[0]
    assert head.dtype == torch.float32
    assert (head - torch.autograd.grad(wide.total, case[1])[0]).norm() < 0.02 * head.norm()


def test_the_heads_gradient_over_many_chunks_is_summed_in_float32():
    case = narrow(make_case(rows=1024))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, parts = (fused_head_loss(*case, **KL, chunk_positions=size).total for size in (1024, 2))
    whole, parts = (torch.autograd.grad(total, case[1])[0] for total in (whole, parts))
    assert (parts - whole).norm() < 5e-3 * whole.norm()  # summed in bfloat16, 512 chunks differ by 0.1 and more


class Recorder(TorchDispatchMode):
    """Records which operators make tensors of which shapes; views of what there is already are left out."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        flat = result if isinstance(result, list | tuple) else [result]
        if not any(argument.alias_info for argument in function._schema.returns):
            self.made |= {(function._opname, tuple(each.shape)) for each in flat if isinstance(each, torch.Tensor)}
        return result

    def shapes(self):
        return {shape for _, shape in self.made}


@pytest.mark.parametrize("whole", [True, False], ids=["hidden", "top-k"])
@pytest.mark.parametrize("kind", KINDS)
def test_never_more_than_a_chunk_of_logits_nor_a_gradient_of_a_frozen_head(kind, whole):
    case = narrow(make_case(rows=64))
    student, head, teacher, teacher_head, labels = case
    ids, log_p, tail = top_k(case, 2.0)
    targets, fused = ((teacher, teacher_head), fused_head_loss) if whole else ((ids, log_p, tail), fused_top_k_loss)
    for trained in (True, False):
        with Recorder() as seen:
            options = {"divergence": Divergence(kind, temperature=2.0), **MIXED, "chunk_positions": 16}
            fused(student, head.requires_grad_(trained), *targets, labels, **options).total.backward()
        assert max(shape[0] for shape in seen.shapes() if shape[-1:] == (V,)) == 16
        assert ((V, H_STUDENT) in seen.shapes()) == trained
