"""How far judges of the same questions agree beyond chance: two of them (Cohen's kappa), or a jury (Krippendorff's alpha)."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_jobs.core.records import Winner
from ray_jobs.judging.bootstrap import SAMPLES, middle_95, resampled_sums
from ray_jobs.judging.win_rates import LABELS

Tables = NDArray[np.float64]


class Agreement(NamedTuple):
    """How two judges of the same questions agree, beyond chance.

    `table[i][j]` counts what the first judge gave to `labels[i]` and the second to `labels[j]`. `kappa` is Cohen's, with
    a 95% bootstrap interval over questions; None where chance alone explains all.
    """

    labels: tuple[Winner, ...]
    table: list[list[int]]
    num: int
    share: float | None
    kappa: float | None
    low: float | None
    high: float | None


class JuryAgreement(NamedTuple):
    """Krippendorff's alpha (nominal) of several judges, with a 95% bootstrap interval over questions.

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
    kappa = _number(_kappa(tables.sum(axis=0)[None])[0])
    if kappa is None:
        return Agreement(labels, table.tolist(), num, float(np.trace(table) / num), None, None, None)
    drawn = resampled_sums(tables.reshape(len(tables), -1), seed=seed, samples=samples)
    low, high = middle_95(_kappa(drawn.reshape(samples, len(labels), len(labels))))
    return Agreement(labels, table.tolist(), num, float(np.trace(table) / num), kappa, _number(low), _number(high))


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
    alpha = _number(_alpha(pairs.sum(axis=0)[None])[0])
    if alpha is None:
        return JuryAgreement(None, None, None, len(counts_QL))
    drawn = resampled_sums(pairs.reshape(len(pairs), -1), seed=seed, samples=samples)
    low, high = middle_95(_alpha(drawn.reshape(samples, len(labels), len(labels))))
    return JuryAgreement(alpha, _number(low), _number(high), len(counts_QL))


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


def _kappa(tables: Tables) -> NDArray[np.float64]:
    total = tables.sum(axis=(1, 2))
    observed = np.trace(tables, axis1=1, axis2=2) / total
    expected = (tables.sum(axis=2) * tables.sum(axis=1)).sum(axis=1) / total**2
    return np.divide(observed - expected, 1 - expected, out=np.full(len(tables), np.nan), where=expected < 1)


def _alpha(pairs: Tables) -> NDArray[np.float64]:
    given = pairs.sum(axis=2)
    total = given.sum(axis=1)
    seen = total - np.trace(pairs, axis1=1, axis2=2)
    by_chance = (total**2 - (given**2).sum(axis=1)) / (total - 1)
    return 1 - np.divide(seen, by_chance, out=np.full(len(pairs), np.nan), where=by_chance > 0)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
