"""What a loss needs of the targets, the models and the workers, said before anything starts."""

from typing import TYPE_CHECKING, Any

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.layers import pair_layers
from ray_jobs.distillation.on_policy import check_on_policy

if TYPE_CHECKING:
    from ray_jobs.distillation.start import Start


def check_losses(
    section: dict[str, Any], *, student: dict[str, Any], teacher: dict[str, Any], start: "Start", cuts_parameters: bool
) -> None:
    """Refuse a loss that could not be computed or trained.

    Args:
        section: the fields of [distill].
        student: its config.json, as `teacher` is the teacher's.
        start: where the student's first weights come from.
        cuts_parameters: whether the strategy keeps a part of each parameter on each worker.

    Raises:
        ConfigError: what does not go together, or a layer that a model does not have.
    """
    keeps = section["cache"]["keep"] if section["cache"]["folder"] else None
    if section["targets"] == "text":
        check_text(section)
    if section["vocabulary"] == "uld":
        check_uld(section, has_model=start.layers is None, cache_keeps=keeps)
    check_several(section)
    check_on_policy(section, cuts_parameters=cuts_parameters)
    if section["hidden_weight"]:
        numbers = {"num_student_layers": student["num_hidden_layers"], "num_teacher_layers": teacher["num_hidden_layers"]}
        pair_layers(section["hidden_layers"], kept=start.layers, **numbers)
        check_hidden_loss(
            layers=str(section["hidden_layers"]),
            targets=section["targets"],
            cache_keeps=keeps,
            widths=(student["hidden_size"], teacher["hidden_size"]),
            cuts_parameters=cuts_parameters,
        )


def check_uld(section: dict[str, Any], *, has_model: bool, cache_keeps: str | None) -> None:
    """Refuse what a student with another tokenizer cannot learn by.

    Args:
        section: the fields of [distill].
        has_model: whether the student is a model of its own.
        cache_keeps: what a cache keeps; none without one.

    Raises:
        ConfigError: names what does not go with it.
    """
    refused = {
        "a student built from the teacher (set student.model)": not has_model,
        f'distill.targets = "{section["targets"]}"': section["targets"] == "text",
        'distill.cache.keep = "top_k"': cache_keeps == "top_k",
        f"distill.hidden_weight = {section['hidden_weight']:g}": section["hidden_weight"] > 0,
        f"distill.on_policy.share = {section['on_policy']['share']:g}": section["on_policy"]["share"] > 0,
        "[distill.teachers]": bool(section["teachers"]),
        f'distill.divergence = "{section["divergence"]}"': section["divergence"] != "forward_kl",
        f'distill.balance = "{section["balance"]}"': section["balance"] != "none",
    }
    for what in (what for what, is_set in refused.items() if is_set):
        raise ConfigError(
            f'distill.vocabulary = "uld" compares sorted distributions of one teacher with those of a model with a tokenizer of its own; '
            f'it does not go with {what}: change that, or use vocabulary = "same"'
        )


def check_text(section: dict[str, Any]) -> None:
    """Refuse what a teacher that gives words alone does not bring: the student would train without it in silence.

    Args:
        section: the fields of [distill].

    Raises:
        ConfigError: names what does not go with it.
    """
    writes = section["text"]["base_url"] is None  # a model of our own, in distill.dtype; an endpoint stores its own
    refused = {
        f"distill.hidden_weight = {section['hidden_weight']:g}": section["hidden_weight"] > 0,
        f'distill.balance = "{section["balance"]}"': section["balance"] != "none",
        f'distill.cache.folder = "{section["cache"]["folder"]}"': section["cache"]["folder"] is not None,
        f'distill.teacher_quantization = "{section["teacher_quantization"]}"': writes and section["teacher_quantization"] != "none",
    }
    for what in (what for what, is_set in refused.items() if is_set):
        raise ConfigError(
            f'distill.targets = "text" trains on the teacher\'s words by cross-entropy alone and keeps answers, not targets; it does not '
            f'go with {what}: leave that out, or use targets = "worker" or "pool"'
        )


def check_hidden_loss(*, layers: str, targets: str, cache_keeps: str | None, widths: tuple[int, int], cuts_parameters: bool) -> None:
    """Refuse a loss on hidden states that could not be computed or trained.

    Args:
        layers: the config's `hidden_layers`; anything but "last" needs the outputs of single layers.
        targets: worker, pool or text.
        cache_keeps: what a cache keeps, "hidden" or "top_k"; none without one.
        widths: of the student and the teacher.
        cuts_parameters: whether the strategy keeps a part of each parameter on each worker.

    Raises:
        ConfigError: the targets do not hold the states, or a projection would be cut in pieces.
    """
    if layers != "last" and (targets != "worker" or cache_keeps):
        where = f'targets = "{targets}"' if targets != "worker" else "cache.folder"
        raise ConfigError(
            f"distill.hidden_layers = {layers} needs the outputs of the teacher's single layers, which {where} does not bring: "
            'use targets = "worker" without a cache, or hidden_layers = "last"'
        )
    if cache_keeps == "top_k":
        raise ConfigError('distill.hidden_weight above 0 needs hidden states, and cache.keep = "top_k" has none: use cache.keep = "hidden"')
    if widths[0] != widths[1] and cuts_parameters:
        raise ConfigError(
            f"distill.hidden_weight above 0 projects the student's width {widths[0]} to the teacher's {widths[1]}, and a projection is "
            'only trained whole: use workers.strategy = "ddp", or "deepspeed" with zero_stage 1 or 2'
        )


def check_several(section: dict[str, Any]) -> None:
    """Refuse what several teachers cannot give together; `check_uld` has refused theirs with another tokenizer.

    Args:
        section: the fields of [distill].

    Raises:
        ConfigError: names what does not go with [distill.teachers].
    """
    refused = {
        f"distill.hidden_weight = {section['hidden_weight']:g} (whose hidden states?): set it to 0": section["hidden_weight"] > 0,
        'distill.targets = "text" (one writer answers): use "worker" or "pool"': section["targets"] == "text",
        "distill.kd_weight = 0 (their word then weighs nothing): set it above 0": section["kd_weight"] == 0,
    }
    for what in (what for what, is_set in refused.items() if is_set and section["teachers"]):
        raise ConfigError(f"[distill.teachers.{next(iter(section['teachers']))}] does not go with {what}, or leave out [distill.teachers]")
