"""The vocabulary rule: the same token-to-id map goes, padded columns are cut, anything else is refused by its first token."""

from collections.abc import Mapping

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import resolve_model
from ray_jobs.training.architecture import find_architecture
from ray_jobs.training.models import load_tokenizer

WAYS_OUT = 'use distill.vocabulary = "uld", which compares sorted probabilities, a student of the same family, or student.layers'


def shared_vocabulary(student: str, teacher: str) -> int:
    """Return how many rows of two models' heads are compared; reads their tokenizers and configs alone.

    Args:
        student: as `resolve_model` takes it, as the teacher.

    Raises:
        ConfigError: as `check_vocabulary` and `shared_tokens`.
    """
    tokens, theirs = (load_tokenizer(resolve_model(name)).get_vocab() for name in (student, teacher))
    check_vocabulary(tokens, theirs)
    rows = [find_architecture(name).config.vocab_size for name in (student, teacher)]
    return shared_tokens(tokens, student_rows=rows[0], teacher_rows=rows[1])


def shared_with_others(student: str, teachers: Mapping[str, str]) -> list[int]:
    """Return how many rows of the student's head and of each further teacher's are compared.

    Args:
        student: as `resolve_model` takes it.
        teachers: such names, by those in [distill.teachers].

    Raises:
        ConfigError: as `shared_vocabulary`, naming the teacher that does not fit.
    """
    found = []
    for name, teacher in teachers.items():
        try:
            found.append(shared_vocabulary(student, teacher))
        except ConfigError as error:
            raise ConfigError(f"[distill.teachers.{name}] model = {teacher!r}: {error}, or leave this teacher out") from None
    return found


def chat_template(model: str) -> str | None:
    """Return a model's chat template."""
    return load_tokenizer(resolve_model(model)).chat_template


def check_vocabulary(student_tokens: dict[str, int], teacher_tokens: dict[str, int]) -> None:
    """Refuse a student whose tokens mean something else than the teacher's: their distributions cannot be compared.

    Args:
        student_tokens: token to id, as `tokenizer.get_vocab()` returns it.
        teacher_tokens: the same of the teacher.

    Raises:
        ConfigError: names the first token, by id, that differs.
    """
    if student_tokens == teacher_tokens:
        return
    differing = student_tokens.items() ^ teacher_tokens.items()
    token, _ = min(differing, key=lambda item: (item[1], item[0]))
    raise ConfigError(
        f"student.model has another vocabulary than the teacher: token {token!r} has id {student_tokens.get(token)} in the student and "
        f"{teacher_tokens.get(token)} in the teacher; {WAYS_OUT}"
    )


def shared_tokens(tokens: dict[str, int], *, student_rows: int, teacher_rows: int) -> int:
    """Return how many rows of both heads are compared: all where they are equally many, else those that the tokenizer has ids for.

    Families pad their heads to multiples that suit their hardware, so that models with one tokenizer differ in rows
    that stand for no token (Qwen2: 151936 and 152064). Equal heads are left whole: their padding was trained with them.

    Args:
        tokens: token to id, the same for both.
        student_rows: rows of the student's output head.
        teacher_rows: rows of the teacher's.

    Raises:
        ConfigError: the heads differ, and one has fewer rows than the tokenizer has ids.
    """
    if student_rows == teacher_rows:
        return student_rows
    needed, least = max(tokens.values()) + 1, min(student_rows, teacher_rows)
    if least < needed:
        token, index = min((item for item in tokens.items() if item[1] >= least), key=lambda item: item[1])
        smaller = "student" if student_rows < teacher_rows else "teacher"
        raise ConfigError(
            f"student.model scores {student_rows} tokens and the teacher {teacher_rows}, and their tokenizer has ids up to {needed - 1}: "
            f"token {token!r} with id {index} has no row in the {smaller}; {WAYS_OUT}"
        )
    return needed
