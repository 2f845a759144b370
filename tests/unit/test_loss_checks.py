"""What losses refuse before anything starts, and the preset's numbers."""

import pytest

from ray_jobs.core.config_distill import DistillSection
from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.layers import pair_layers
from ray_jobs.distillation.loss_checks import check_hidden_loss, check_losses, check_several, check_uld
from ray_jobs.distillation.start import Start

GOOD = {"layers": "mapped", "targets": "worker", "cache_keeps": None, "widths": (64, 64), "cuts_parameters": True}
NUMBERS = {"num_student_layers": 2, "num_teacher_layers": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": "pool"}, r'needs the outputs of .* which targets = "pool" does not bring: use targets = "worker"'),
        ({"cache_keeps": "hidden"}, r"which cache.folder does not bring"),
        ({"layers": "last", "cache_keeps": "top_k"}, r'cache.keep = "top_k" has none: use cache.keep = "hidden"'),
        ({"widths": (32, 64)}, r'width 32 to the teacher\'s 64, .*: use workers.strategy = "ddp"'),
    ],
)
def test_what_cannot_be_computed_or_trained_is_refused_with_what_to_do(change, message):
    check_hidden_loss(**GOOD)
    with pytest.raises(ConfigError, match=message):
        check_hidden_loss(**(GOOD | change))


@pytest.mark.parametrize(
    ("fields", "has_model", "cache_keeps", "message"),
    [
        ({}, False, None, r"a student built from the teacher \(set student.model\)"),
        ({"targets": "text"}, True, None, r'distill.targets = "text"'),
        ({}, True, "top_k", r'distill.cache.keep = "top_k"'),
        ({"hidden_weight": 1.0}, True, None, r"distill.hidden_weight = 1"),
        ({"on_policy": {"share": 0.5}}, True, None, r"distill.on_policy.share = 0.5"),
        ({"teachers": {"law": {"model": "other"}}}, True, None, r"\[distill.teachers\]"),
        ({"divergence": "reverse_kl"}, True, None, r'distill.divergence = "reverse_kl"'),
        ({"balance": "magnitude"}, True, None, r'distill.balance = "magnitude"'),
    ],
)
def test_what_a_student_with_another_tokenizer_cannot_learn_by_is_refused(fields, has_model, cache_keeps, message):
    check_uld(DistillSection(vocabulary="uld").model_dump(), has_model=True, cache_keeps="hidden")
    with pytest.raises(ConfigError, match=rf"does not go with {message}: change that"):
        check_uld(DistillSection(vocabulary="uld", **fields).model_dump(), has_model=has_model, cache_keeps=cache_keeps)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"hidden_weight": 1.0}, "distill.hidden_weight = 1"),
        ({"preset": "distilbert"}, "distill.hidden_weight = 1"),
        ({"balance": "magnitude"}, 'distill.balance = "magnitude"'),
        ({"cache": {"folder": "kept"}}, 'distill.cache.folder = "kept"'),
        ({"teacher_quantization": "nf4"}, 'distill.teacher_quantization = "nf4"'),
    ],
)
def test_what_a_teacher_of_words_alone_does_not_bring_is_refused(fields, what):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64}
    options = {"student": sizes, "teacher": sizes, "start": Start("teacher", (0, 1)), "cuts_parameters": False}
    check_losses(DistillSection(targets="text").model_dump(), **options)
    with pytest.raises(ConfigError, match=f"by cross-entropy alone .* does not go with {what}: leave that out"):
        check_losses(DistillSection(targets="text", **fields).model_dump(), **options)


def test_layers_meet_as_the_config_says():
    assert pair_layers("last", kept=[0, 5], **NUMBERS) == []
    assert pair_layers("mapped", kept=[0, 5], **NUMBERS) == [(0, 0), (1, 5)]
    assert pair_layers([(1, 4)], kept=None, **NUMBERS) == [(1, 4)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("mapped", r'"mapped" needs a student built from teacher layers: name \[student, teacher\] pairs'),
        ([(2, 0)], r"has the pair \[2, 0\], but the student has 2 layers: choose from 0 to 1"),
        ([(0, 6)], r"has the pair \[0, 6\], but the teacher has 6 layers: choose from 0 to 5"),
        ([(0, -1)], r"has the pair \[0, -1\]"),
    ],
)
def test_layers_that_a_model_does_not_have_are_refused(pairs, message):
    with pytest.raises(ConfigError, match=message):
        pair_layers(pairs, kept=None, **NUMBERS)


def test_the_preset_is_distilberts_and_yields_to_what_the_config_says():
    section = DistillSection(preset="distilbert")
    assert (section.kd_temperature, section.kd_weight, section.ce_weight, section.hidden_weight, section.hidden_loss) == (
        2,
        5,
        2,
        1,
        "cosine",
    )
    assert DistillSection(preset="distilbert", ce_weight=0.5).ce_weight == 0.5


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"beta": 0.0}, {"skew": 1.5}, {"kd_temperature": 0.0}, {"kd_weight": -1.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillSection(**wrong)


def test_what_is_not_done_is_refused_instead_of_left_out():
    check_several(DistillSection(hidden_weight=1.0).model_dump())
    several = DistillSection(teachers={"law": {"model": "other"}}).model_dump()
    check_several(several)
    for wrong in ({"hidden_weight": 1.0}, {"targets": "text"}, {"kd_weight": 0}):
        with pytest.raises(ConfigError, match=rf"\[distill.teachers.law\] does not go with distill.{next(iter(wrong))} .* leave out"):
            check_several(several | wrong)
