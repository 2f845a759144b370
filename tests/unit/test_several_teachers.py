"""Several teachers: who teaches which source, and their divergences in one pass against each of them dense and alone."""

import itertools

import pytest
import torch

from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigError
from ray_jobs.corpus.files import is_named
from ray_jobs.distillation.dense import dense_divergence, dense_top_k_loss
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.several import fused_several_loss
from ray_jobs.distillation.shares import EVERYTHING, Teaches, share_out, teaching_of
from ray_jobs.distillation.targets import HiddenTarget, Part, SeveralTarget
from ray_jobs.distillation.topk import TopKTarget, make_top_k

N, V = 300, 11
SOURCES = ["course/a.md", "course/deep/b.md", "pairs.jsonl"]


@pytest.mark.parametrize(
    ("name", "pattern", "is_meant"),
    [
        ("course/a.md", "course/a.md", True),
        ("course/a.md", "a.md", True),
        ("course/a.md", "*.md", True),
        ("course/deep/b.md", "course", True),
        ("course/deep/b.md", "course/", True),
        ("course/deep/b.md", "course/*.md", False),
        ("course/deep/b.md", "course/**", True),
        ("s3://bucket/course/b.md", "s3://bucket/course", True),
        ("course/a.md", "b.md", False),
        ("course/a.mdx", "*.md", False),
    ],
)
def test_sources_are_named_as_in_data(name, pattern, is_meant):
    assert is_named(name, pattern) is is_meant


def test_shares_of_a_source_add_up_to_one():
    teachers = {"teacher": Teaches(weight=2.0), "law": Teaches(("*.md",), weight=6.0), "all": Teaches(("pairs.jsonl", "course/a.md"), 2.0)}
    assert share_out(teachers, SOURCES) == [[0.2, 0.6, 0.2], [0.25, 0.75, 0.0], [0.5, 0.0, 0.5]]


def test_the_config_says_who_teaches_what_and_refuses_what_means_nothing():
    law = {"model": "other", "sources": ["law"], "weight": 3}
    section = validate({"run": {"name": "a"}, "distill": {"teachers": {"law": law}, "teacher_sources": ["*.md"]}}).distill
    assert teaching_of(section.model_dump()) == {"teacher": Teaches(("*.md",), 1.0), "law": Teaches(("law",), 3.0)}
    for wrong, why in (
        ({"teachers": {"law": {**law, "weight": 0}}}, r"distill\.teachers\.law\.weight' = 0: .* greater than 0"),
        ({"teachers": {"law": {"sources": []}}}, r"teachers\.law\.model"),
        ({"teachers": {"teacher": law}}, r"\[distill\.teachers\.teacher\] is the name of \[teacher\] itself"),
        ({"teachers": {"a b": law}}, r"letters, digits"),
        ({"teacher_sources": ["a.md"]}, r"teacher_sources = \['a\.md'\] is for several teachers"),
        ({"teacher_weight": 2}, r"teacher_weight = 2\.0 is for several teachers"),
    ):
        with pytest.raises(ConfigError, match=why):
            validate({"run": {"name": "a"}, "distill": wrong})


def test_a_source_that_there_is_not_and_one_that_nobody_teaches_are_refused():
    with pytest.raises(ConfigError, match=r"\[distill\.teachers\.law\] sources: 'b\.txt' names no source .*'course/a\.md', 'course/deep"):
        share_out({"teacher": Teaches(), "law": Teaches(("b.txt",))}, SOURCES)
    with pytest.raises(ConfigError, match=r"distill\.teacher_sources: 'none\*' names no source"):
        share_out({"teacher": Teaches(("none*",))}, SOURCES)
    with pytest.raises(ConfigError, match=r"nobody teaches 'course/deep/b\.md': name it in distill\.teacher_sources or"):
        share_out({"teacher": Teaches(("a.md",)), "law": Teaches(("*.jsonl",))}, SOURCES)
    with pytest.raises(ConfigError, match=r"'everything' \(rows of an older prepare.*--force"):
        share_out({"teacher": Teaches(("a.md",))}, [EVERYTHING])
    many = [f"{number}.md" for number in range(40)]
    with pytest.raises(ConfigError, match=r"'11\.md' and 28 more$"):
        share_out({"teacher": Teaches(("none",))}, many)


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def voices(shares_NK):
    """Two teachers of widths 5 and 7, with three padded rows in the head of one."""
    parts, logits = {}, []
    for number, (name, width, rows) in enumerate((("one", 5, V), ("other", 7, V + 3))):
        states_NH, head_VH = drawn(N, width, seed=number), drawn(rows, width, seed=10 + number)
        places_M = shares_NK[:, number].nonzero()[:, 0]
        target = HiddenTarget(states_NH[places_M], head_VH)
        parts[name] = Part(target, places_M, shares_NK[places_M, number]) if len(places_M) else None
        logits.append(states_NH @ head_VH[:V].T)
    return SeveralTarget(parts), logits


SHARES = {
    "apart": lambda first: torch.stack([first, ~first], dim=1).double(),
    "some shared": lambda first: torch.where(first[:, None], torch.tensor([0.3, 0.7]), torch.tensor([0.0, 1.0])).double(),
    "one silent": lambda first: torch.stack([torch.ones_like(first), torch.zeros_like(first)], dim=1).double(),
}
KINDS = ["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"]


@pytest.mark.parametrize(("who", "kind"), list(itertools.product(SHARES, KINDS)))
def test_value_and_gradient_are_those_of_each_teacher_dense_by_its_share(who, kind):
    shares_NK = SHARES[who](drawn(N, seed=5) > 0.5)
    target, teachers = voices(shares_NK)
    student, head = drawn(N, 6, seed=7).requires_grad_(), drawn(V, 6, seed=8).requires_grad_()
    labels, divergence = torch.arange(N) % V, Divergence(kind, temperature=2.0)
    found = fused_several_loss(student, head, target, labels, divergence=divergence, kd_weight=0.9, ce_weight=0.2)
    logits = student @ head.T
    each = [dense_divergence(logits, theirs, divergence) for theirs in teachers]
    shared = sum(share * one for share, one in zip(shares_NK.T, each, strict=True)).sum()
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    want = 0.9 * shared + 0.2 * ce
    torch.testing.assert_close((found.total, found.divergence, found.ce), (want, shared, ce))
    for mine, theirs in zip(*(torch.autograd.grad(total, (student, head)) for total in (found.total, want)), strict=True):
        torch.testing.assert_close(mine, theirs)
    for name, share, one in zip(("one", "other"), shares_NK.T, each, strict=True):
        torch.testing.assert_close(found.each[name].divergence, one[share > 0].sum())
        assert found.each[name].tokens == int((share > 0).sum())


def test_a_teacher_of_likeliest_tokens_goes_beside_a_whole_one():
    shares_NK = SHARES["some shared"](drawn(N, seed=5) > 0.5)
    target, teachers = voices(shares_NK)
    whole, labels, divergence = target.parts["other"], torch.arange(N) % V, Divergence(temperature=2.0)
    kept = make_top_k(whole.target.hidden_NH, whole.target.head_VH[:V], labels[whole.places_M], k=4)
    assert isinstance(kept, TopKTarget)
    target.parts["other"] = whole._replace(target=kept)
    student, head = drawn(N, 6, seed=7).requires_grad_(), drawn(V, 6, seed=8)
    options = {"divergence": divergence, "kd_weight": 1.0, "ce_weight": 0.0}
    found = fused_several_loss(student, head, target, labels, num_tokens=V, **options)
    first = (shares_NK[:, 0] * dense_divergence(student @ head.T, teachers[0], divergence)).sum()
    at, own = whole.places_M, kept.at(2.0)
    second = sum(
        share * dense_top_k_loss(student[[place]], head, *(column[[row]] for column in own), labels[[place]], **options).total
        for row, (place, share) in enumerate(zip(at.tolist(), whole.shares_M, strict=True))
    )
    torch.testing.assert_close(found.total, first + second, rtol=1e-6, atol=1e-6)
    mine, theirs = (torch.autograd.grad(total, student)[0] for total in (found.total, first + second))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_no_position_at_all_is_zero():
    target = SeveralTarget({"one": None, "other": None})
    student, head = drawn(0, 6, seed=7).requires_grad_(), drawn(V, 6, seed=8)
    found = fused_several_loss(student, head, target, torch.zeros(0, dtype=torch.long), divergence=Divergence(), kd_weight=1, ce_weight=1)
    found.total.backward()
    assert found.total == 0 and student.grad.shape == (0, 6) and found.each["other"].tokens == 0
