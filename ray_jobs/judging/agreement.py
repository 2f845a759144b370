"""How far judges of the same questions agree beyond chance: two of them (Cohen's kappa), or a jury (Krippendorff's alpha)."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_jobs.core.records import Winner
from ray_jobs.judging.bootstrap import SAMPLES, middle_95, resampled_sums
from ray_jobs.judging.rates import clustered_rate
from ray_jobs.judging.win_rates import LABELS

Floats = NDArray[np.float64]
Tables = Floats
_Figures = tuple[float | None, float | None, float | None]
_NO_WIDTH = 1e-12


class Agreement(NamedTuple):
    """How two judges of the same questions agree, beyond chance.

    `table[i][j]` counts what the first judge gave to `labels[i]` and the second to `labels[j]`. `kappa` is Cohen's, with
    a 95% interval over questions; None where chance alone explains all.
    """

    labels: tuple[Winner, ...]
    table: list[list[int]]
    num: int
    share: float | None
    kappa: float | None
    low: float | None
    high: float | None


class JuryAgreement(NamedTuple):
    """Krippendorff's alpha (nominal) of several judges, with a 95% interval over questions.

    `num` counts the questions that at least two judges scored.
    """

    alpha: float | None
    low: float | None
    high: float | None
    num: int


def agreement(
    first: Iterable[Winner | None],
    second: Iterable[Winner | None],
    *,
    labels: tuple[Winner, ...] = LABELS,
    questions: Sequence[Hashable] | None = None,
    seed: int = 0,
    samples: int = SAMPLES,
) -> Agreement:
    """Return the agreement of two judges on the same items, in the same order.

    Args:
        first: verdicts of one judge.
        second: verdicts of the other.
        labels: verdicts that count; an item where either judge says another one (or None) is left out.
            ("a", "b") gives the 2x2 table without ties.
        questions: the question of each item, where one has several (as over several pairs of models); else one each.
        seed: of the bootstrap.
        samples: of the bootstrap.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    place = {label: i for i, label in enumerate(labels)}
    pairs = list(zip(first, second, strict=True))
    items = range(len(pairs)) if questions is None else questions
    tables = _tables([(item, x, y) for item, (x, y) in zip(items, pairs, strict=True)], place)
    table = tables.sum(axis=0).astype(int)
    num = int(table.sum())
    if not num:
        return Agreement(labels, table.tolist(), 0, None, None, None, None)
    found = _with_interval(tables, _chance_of_two, seed=seed, samples=samples)
    return Agreement(labels, table.tolist(), num, float(np.trace(table) / num), *found)


def jury_agreement(
    verdicts: Sequence[Sequence[Winner | None]], *, labels: tuple[Winner, ...] = LABELS, seed: int = 0, samples: int = SAMPLES
) -> JuryAgreement:
    """Return Krippendorff's alpha of judges who scored the same questions; a question may lack some of them.

    Args:
        verdicts: for each judge, one verdict a question, in the same order.
        labels: verdicts that count.
        seed: of the bootstrap.
        samples: of the bootstrap.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C.
    """
    counts_QL = np.array([[said.count(label) for label in labels] for said in zip(*verdicts, strict=True)], dtype=np.float64)
    counts_QL = counts_QL.reshape(-1, len(labels))
    counts_QL = counts_QL[counts_QL.sum(axis=1) >= 2]
    if not len(counts_QL):
        return JuryAgreement(None, None, None, 0)
    # coincidences: every ordered pair of two judges of a question, worth one verdict each
    pairs = np.einsum("qi,qj->qij", counts_QL, counts_QL) - np.einsum("qi,ij->qij", counts_QL, np.eye(len(labels)))
    pairs /= (counts_QL.sum(axis=1) - 1)[:, None, None]
    return JuryAgreement(*_with_interval(pairs, _chance_of_jury, seed=seed, samples=samples), len(counts_QL))


def majority(verdicts: Iterable[Winner | None]) -> Winner | None:
    """Return what more than half of the judges who scored say; a tie where none does, None where nobody scored."""
    said = [verdict for verdict in verdicts if verdict is not None]
    if not said:
        return None
    return next((label for label in LABELS if 2 * said.count(label) > len(said)), "tie")


def _tables(items: list[tuple[Hashable, Winner | None, Winner | None]], place: dict[Winner, int]) -> Tables:
    """Return one table a question, of the items that both judges gave a label."""
    both = [(item, place[x], place[y]) for item, x, y in items if x in place and y in place]
    row_of = {item: i for i, item in enumerate(dict.fromkeys(item for item, _, _ in both))}
    tables = np.zeros((len(row_of), len(place), len(place)))
    for item, i, j in both:
        tables[row_of[item], i, j] += 1
    return tables


def _with_interval(tables: Tables, by_chance: Callable[[Tables], Floats], *, seed: int, samples: int) -> _Figures:
    """Return the agreement beyond chance of all questions together, and its 95% interval; all None where it is undefined.

    Where no draw can differ (they never disagree, or one of them always says the same) a bootstrap has no width, however few
    the questions. There the interval is that of the share on which they agree, on the scale of the figure.

    Args:
        tables: one a question.
        by_chance: tables -> the share of agreement that chance alone would give.
    """
    whole = tables.sum(axis=0)[None]
    expected = float(by_chance(whole)[0])
    if expected >= 1:
        return None, None, None
    drawn = resampled_sums(tables.reshape(len(tables), -1), seed=seed, samples=samples).reshape(-1, *tables.shape[1:])
    low, high = middle_95(_beyond(drawn, by_chance))
    if high - low < _NO_WIDTH:
        share = clustered_rate(np.trace(tables, axis1=1, axis2=2), tables.sum(axis=(1, 2)))
        low, high = (max(-1.0, (bound - expected) / (1 - expected)) for bound in (share.low or 0.0, share.high or 0.0))
    return float(_beyond(whole, by_chance)[0]), float(low), float(high)


def _beyond(tables: Tables, by_chance: Callable[[Tables], Floats]) -> Floats:
    """Return (seen - chance) / (1 - chance), nan where chance explains all."""
    seen, expected = np.trace(tables, axis1=1, axis2=2) / tables.sum(axis=(1, 2)), by_chance(tables)
    return np.divide(seen - expected, 1 - expected, out=np.full(len(tables), np.nan), where=expected < 1)


def _chance_of_two(tables: Tables) -> Floats:
    """Cohen's: each judge keeps to its own shares of the labels."""
    chance: Floats = (tables.sum(axis=2) * tables.sum(axis=1)).sum(axis=1) / tables.sum(axis=(1, 2)) ** 2
    return chance


def _chance_of_jury(tables: Tables) -> Floats:
    """Krippendorff's: any two verdicts of all that were given, without putting the first one back."""
    given = tables.sum(axis=2)
    total = given.sum(axis=1)
    chance: Floats = 1 - (total**2 - (given**2).sum(axis=1)) / (total - 1) / total
    return chance
