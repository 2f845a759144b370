"""What a loss needs of the targets, the models and the workers, said before anything starts."""

from ray_jobs.core.errors import ConfigError


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


def check_one_teacher(*, on_policy_share: float, teachers: list[str]) -> None:
    """Refuse what the training of language models does not do: rather an end than a run without it.

    Raises:
        ConfigError: answers of the student's own, or further teachers, are asked for.
    """
    if on_policy_share:
        raise ConfigError(
            f"distill.on_policy.share = {on_policy_share:g}: the student does not write its own answers yet, all batches are of the "
            "training text: set it to 0"
        )
    if teachers:
        raise ConfigError(f"[distill.teachers.{teachers[0]}]: one teacher alone is asked so far: leave out [distill.teachers]")
