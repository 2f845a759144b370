"""Who teaches which source, and with which share beside the others who do."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ray_jobs.core.errors import ConfigError
from ray_jobs.corpus.files import is_named

FIRST = "teacher"
"""Name of the teacher of [teacher] beside those of [distill.teachers]."""
EVERYTHING = "everything"
"""The one source of packed rows that name none."""
_LISTED = 12


class Teaches(NamedTuple):
    """What a teacher teaches."""

    sources: tuple[str, ...] = ()
    """Patterns of names; none is everything."""
    weight: float = 1.0
    """Beside the other teachers of the same text; above 0."""

    def covers(self, source: str) -> bool:
        """Return whether a source is one of its own."""
        return not self.sources or any(is_named(source, pattern) for pattern in self.sources)


def teaching_of(section: Mapping[str, Any]) -> dict[str, Teaches]:
    """Return what each teacher teaches, by name, that of [teacher] first.

    Args:
        section: fields of [distill].
    """
    first = Teaches(tuple(section["teacher_sources"]), section["teacher_weight"])
    return {FIRST: first, **{name: Teaches(tuple(each["sources"]), each["weight"]) for name, each in section["teachers"].items()}}


def check_sources(teachers: Mapping[str, Teaches], sources: Iterable[str]) -> None:
    """Refuse teachers of what there is not.

    Args:
        teachers: by name.
        sources: names of all there are.

    Raises:
        ConfigError: a pattern names none of them, which the message lists.
    """
    known = list(sources)
    for name, teaches in teachers.items():
        for pattern in (pattern for pattern in teaches.sources if not any(is_named(source, pattern) for source in known)):
            field = "distill.teacher_sources" if name == FIRST else f"[distill.teachers.{name}] sources"
            older = " (rows of an older prepare, which named none: `raystill prepare CONFIG --force`)" if known == [EVERYTHING] else ""
            raise ConfigError(f"{field}: {pattern!r} names no source of the training text; there are: {_listed(known)}{older}")


def share_out(teachers: Mapping[str, Teaches], sources: Sequence[str]) -> list[list[float]]:
    """Return each teacher's share in the divergence of each source, a row for each: its weight over those of all who teach the source.

    So the divergence keeps its weight against the other terms, whoever teaches.

    Args:
        teachers: by name.
        sources: names of all sources in the packed rows.

    Raises:
        ConfigError: as `check_sources`, or nobody teaches a source.
    """
    check_sources(teachers, sources)
    weights = [[teaches.weight if teaches.covers(source) else 0.0 for teaches in teachers.values()] for source in sources]
    untaught = [source for source, row in zip(sources, weights, strict=True) if not sum(row)]
    if untaught:
        raise ConfigError(
            f"nobody teaches {_listed(untaught)}: name it in distill.teacher_sources or in the sources of one of [distill.teachers] "
            "(an empty list is everything), or leave it out of [data]"
        )
    return [[weight / sum(row) for weight in row] for row in weights]


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + rest
