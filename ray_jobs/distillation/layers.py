"""Which of the teacher's layers the student keeps."""

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
