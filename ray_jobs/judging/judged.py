"""What the judges of a run said, and the manifest's account of it: cards, wins, agreement, and the lines that say them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ray_jobs.core.records import HUMAN, JURY
from ray_jobs.judging.canaries import followed
from ray_jobs.judging.families import kin_of
from ray_jobs.judging.judge_verdict import WEAK_HUMAN_KAPPA, Usability, jury_usability
from ray_jobs.judging.jury import jury_rows
from ray_jobs.judging.pairs import NOT_ASKED
from ray_jobs.judging.results import compare_models, describe_judge, pair_headline, rank_models

Row = dict[str, Any]
BUDGET = "the budget"
"""How the reason of a stop begins that more money ends."""


class Judged(NamedTuple):
    """What one judge said.

    Attributes:
        judge: its name in the rows.
        rows: its Verdict rows.
        facts: for the manifest.
        canaries: rows of canaries.jsonl.
        is_model: a language model: one of the jury.
        stopped: why not all its calls were asked.
    """

    judge: str
    rows: list[Row]
    facts: Row
    canaries: Sequence[Row] = ()
    is_model: bool = False
    stopped: str = ""


def members_of(judged: Sequence[Judged]) -> list[str]:
    """Return the judges that make the jury: the language models, where there are two or more."""
    models = [found.judge for found in judged if found.is_model]
    return models if len(models) > 1 else []


def with_jury(judged: list[Judged]) -> list[Judged]:
    """Return the judges, and after them the jury that the language models among them make."""
    members = members_of(judged)
    rows = jury_rows([row for found in judged for row in found.rows], members)
    return [*judged, *([Judged(JURY, rows, {"members": members, "rubric_sha": rows[0]["rubric_sha"]})] if rows else [])]


def account(
    judged: Sequence[Judged],
    similarities: list[Row],
    *,
    pairs: Sequence[tuple[str, str]],
    tie_bands: Mapping[str, float],
    seed: int,
    min_known_share: float,
    makers: Sequence[str],
) -> Row:
    """Return the manifest's counts, judges with their cards, pairs, ranking and headline.

    Args:
        judged: all judges, a jury and imports among them.
        similarities: Similarity rows.
        tie_bands: as in `compare_models`.
        min_known_share: share of known words below which an answer got no similarity.
        makers: names of the models that the run's models were made from or taught by.
    """
    verdicts = [row for found in judged for row in found.rows]
    names, members = [found.judge for found in judged], members_of(judged)
    results = compare_models(pairs, names, verdicts, similarities, tie_bands=tie_bands, seed=seed, members=members or None)
    cards = {found.judge: _card(found, verdicts, similarities, names, seed) for found in judged}
    if JURY in cards:
        cards[JURY] |= {"usability": _of_jury(cards, members)}
    judges = [_judge(found, makers) | {"card": cards[found.judge]} for found in judged]
    unscored = [row for row in similarities if row["cosine"] is None]
    headline = [f"judge: {pair_headline(entry)}" for entry in results]
    headline += [line for found in judged for line in (_coverage_line(found), _given_up_line(found), _names_line(found)) if line]
    if unscored:
        share = f"fewer than {min_known_share:.0%} of their words or their sample answer's have a vector"
        headline.append(
            f"judge: {len(unscored)} of {len(similarities)} answers have no similarity ({share}, or they are empty): not counted"
        )
    headline += [_word_line(found, entry["card"]) for found, entry in zip(judged, judges, strict=True) if found.judge != HUMAN]
    headline += [
        f"judge: {entry['name']} is of the same family as {entry['family_of']}: it may prefer its own kind"
        for entry in judges
        if entry["family_of"]
    ]
    counts = {
        "similarities": len(similarities),
        "similarities_unscored": len(unscored),
        "verdicts": len(verdicts),
        "verdicts_unscored": sum(row["winner"] is None for row in verdicts),
        "verdicts_flagged": sum(bool(row["flag"]) for row in verdicts),
        "canaries": sum(len(found.canaries) for found in judged),
    }
    ranking = {name: rank_models(verdicts, name, seed=seed) for name in names}
    return {"counts": counts, "judges": judges, "jury": members, "pairs": results, "ranking": ranking, "headline": headline}


def _judge(found: Judged, makers: Sequence[str]) -> Row:
    kin = kin_of(found.facts.get("model", ""), makers) if found.is_model else []
    return {"name": found.judge, **found.facts, "family_of": " and ".join(kin) or None}


def asked_share(rows: Sequence[Row]) -> Row:
    """Return how many of a judge's games were settled or asked, and how many a stop left out."""
    left_out = sum(row["unscored"].startswith(NOT_ASKED) for row in rows)
    return {"games": len(rows), "asked": len(rows) - left_out, "share": (len(rows) - left_out) / len(rows) if rows else None}


def could_go_on(manifest: Row, *, budget_usd: float | None, max_calls: int | None) -> bool:
    """Return whether a stage could go further now.

    Calls that were given up for a reason that may pass, and what the endpoint stopped, are asked again; what the budget
    stopped needs a larger one.
    """
    before = manifest.get("budget", {})
    limits = ((before.get("usd"), budget_usd), (before.get("calls"), max_calls))
    is_larger = any(then is not None and (now is None or now > then) for then, now in limits)
    is_smaller = any(now is not None and (then is None or now < then) for then, now in limits)
    stops = before.get("stopped", [])
    if any(not reason.startswith(BUDGET) for reason in stops) or any(entry.get("given_up_for_now") for entry in manifest.get("judges", [])):
        return True
    return bool(stops) and is_larger and not is_smaller


def _card(found: Judged, verdicts: list[Row], similarities: list[Row], names: list[str], seed: int) -> Row:
    human = HUMAN if HUMAN in names and found.judge != HUMAN else None
    obeyed = followed(found.canaries, found.judge)
    card = describe_judge(verdicts, found.judge, similarities, seed=seed, human=human, canaries_followed=obeyed)
    return {**card, "usability": _of_people(found.facts)} if found.judge == HUMAN else card


def _of_jury(cards: Mapping[str, Row], members: Sequence[str]) -> Row:
    words = {member: cards[member]["usability"]["word"] for member in members}
    return jury_usability(Usability(**cards[JURY]["usability"]), words)._asdict()


def _of_people(facts: Row) -> Row:
    """People are what judges are held against; what can be said of them is how far they agree among themselves."""
    agreed = facts.get("annotator_agreement")
    if not agreed or agreed["alpha"] is None:
        return {"word": "usable", "reasons": []}
    reason = f"{facts['annotators']} annotators agree at Krippendorff's alpha {agreed['alpha']:.2f} on {agreed['num']} questions"
    return {"word": "weak" if agreed["alpha"] < WEAK_HUMAN_KAPPA else "usable", "reasons": [reason]}


def _coverage_line(found: Judged) -> str:
    share = asked_share(found.rows)
    if share["asked"] == share["games"]:
        return ""
    return (
        f"judge: {found.judge} was asked {share['asked']} of {share['games']} games ({share['share']:.0%}), and its figures are of these "
        f"alone, a random part of the questions: {found.stopped}"
    )


def _given_up_line(found: Judged) -> str:
    number = found.facts.get("given_up_for_now", 0)
    if not number:
        return ""
    return f"judge: {found.judge} gave up {number} calls for reasons that may pass: the same command asks these again, and no other"


def _names_line(found: Judged) -> str:
    names = found.facts.get("answered_as", {})
    if len(names) < 2:
        return ""
    listed = ", ".join(f"{name} ({number})" for name, number in sorted(names.items()))
    return f"judge: {found.judge} answered as several models, {listed}: its name was moved in between; name one of them in the config"


def _word_line(found: Judged, card: Row) -> str:
    return f"judge: {found.judge} is {card['usability']['word']}: {'; '.join(card['usability']['reasons'])}"
