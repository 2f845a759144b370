"""Which of the teacher's layers the student keeps."""

from collections.abc import Sequence

from ray_jobs.core.errors import ConfigError


def choose_layers(num_teacher_layers: int, layers: int | list[int]) -> list[int]:
    """Return the indices of the teacher's layers that the student keeps.

    Args:
        num_teacher_layers: layers of the teacher.
        layers: how many to keep, evenly spaced with the first and the last among them (one keeps the first), or
            their indices in rising order.

    Raises:
        ConfigError: more layers than the teacher has, an index out of range, or indices that do not rise.

    Source:
        Sanh et al. 2019, arXiv:1910.01108, section 2 (a student that starts from every second layer).
    """
    if isinstance(layers, int):
        if not 1 <= layers <= num_teacher_layers:
            raise ConfigError(f"student.layers = {layers}, but the teacher has {num_teacher_layers}: choose 1 to {num_teacher_layers}")
        gaps = max(layers - 1, 1)
        return [(2 * i * (num_teacher_layers - 1) + gaps) // (2 * gaps) for i in range(layers)]
    outside = [index for index in layers if not 0 <= index < num_teacher_layers]
    if outside or not layers:
        seen = f"layer {outside[0]} is out of range" if outside else "the list is empty"
        raise ConfigError(
            f"student.layers = {layers}: {seen}; the teacher has {num_teacher_layers}, so choose from 0 to {num_teacher_layers - 1}"
        )
    if layers != sorted(set(layers)):
        raise ConfigError(f"student.layers = {layers}: list each layer once, in rising order, like {sorted(set(layers))}")
    return layers


def pair_layers(
    hidden_layers: str | list[tuple[int, int]], *, kept: Sequence[int] | None, num_student_layers: int, num_teacher_layers: int
) -> list[tuple[int, int]]:
    """Return the [student, teacher] layers whose outputs meet in the loss on hidden states; empty for the last hidden states.

    Args:
        hidden_layers: "last", "mapped", or the pairs themselves.
        kept: the teacher's layers that the student was cut from; none for a student of its own.

    Raises:
        ConfigError: "mapped" without kept layers, or a layer that a model does not have.
    """
    if hidden_layers == "last":
        return []
    if hidden_layers == "mapped":
        if kept is None:
            raise ConfigError(
                'distill.hidden_layers = "mapped" needs a student built from teacher layers: name [student, teacher] pairs, or take "last"'
            )
        return list(enumerate(kept))
    for mine, theirs in hidden_layers:
        for model, layer, number in (("student", mine, num_student_layers), ("teacher", theirs, num_teacher_layers)):
            if not 0 <= layer < number:
                raise ConfigError(
                    f"distill.hidden_layers has the pair [{mine}, {theirs}], but the {model} has {number} layers: "
                    f"choose from 0 to {number - 1}"
                )
    return [(mine, theirs) for mine, theirs in hidden_layers]
