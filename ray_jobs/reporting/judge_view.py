"""The judges' cards as the page shows them: a plain word, its reasons, and every figure with its interval and what would be fair."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ray_jobs.core.records import HUMAN, OFFLINE
from ray_jobs.reporting.numbers_in_words import number, percent
from ray_jobs.reporting.run_files import RunFiles
from ray_jobs.reporting.sentences import capital, judge_in_words, name

Finding = Mapping[str, Any]


class Figure(NamedTuple):
    """One line of a card: the figure as text, its interval in [0, 1] where it has one, and the share that would be fair."""

    label: str
    text: str
    rate: Finding | None = None
    fair: float | None = None


RATES = (
    ("position_consistency", "Same winner in both orders", None),
    ("repeat_stability", "Same verdict when asked again", None),
    ("first_position_rate", "The answer read first wins", 0.5),
    ("longer_rate", "The longer answer wins", None),
    ("length_preference", "The longer answer wins, whichever model's", 0.5),
    ("tie_rate", "Ties", None),
    ("human_share", "Same winner as people", None),
)
ORDER_RATES = ("position_consistency", "first_position_rate")


def judge_view(judge: Finding, run: RunFiles) -> dict[str, Any]:
    """Return a card ready to print: `name`, `kind`, `word`, `reasons`, `figures` and `facts`."""
    manifest = run.manifests["judge"]
    told: Finding = next((entry for entry in manifest.get("judges", []) if entry["name"] == judge["judge"]), {})
    usability = judge["card"]["usability"]
    return {
        "name": judge["judge"],
        "kind": judge_in_words(judge["judge"], told, manifest["settings"]),
        "word": usability["word"],
        "reasons": usability["reasons"],
        "figures": list(_figures(judge)),
        "facts": [*_facts(judge), *_told(told)],
    }


def _figures(judge: Finding) -> Iterator[Figure]:
    card = judge["card"]
    for key, label, fair in RATES:
        # the coverage judge scores each answer by itself, so its winner cannot depend on the order
        if card.get(key, {}).get("value") is not None and not (judge["judge"] == OFFLINE and key in ORDER_RATES):
            yield Figure(label, percent(card[key]["value"]), card[key], fair)
    if card["canaries"]:
        yield Figure("Planted instructions obeyed", f"{card['canaries_followed']} of {card['canaries']}")
    if card["human"]["num"]:
        yield Figure("Agreement with people (kappa)", f"{_kappa(card['human'])} on {card['human']['num']} labels")
    elif judge["judge"] != HUMAN:
        yield Figure("Agreement with people", "no labels; mark some below")


def _kappa(agreed: Finding) -> str:
    if agreed["kappa"] is None:
        return "undefined"
    return f"{number(agreed['kappa'], 2)} ({number(agreed['low'], 2)} to {number(agreed['high'], 2)})"


def _facts(judge: Finding) -> Iterator[tuple[str, Any]]:
    yield "Verdicts", f"{number(judge['verdicts'])} over {number(judge['pairs'])} pairs of answers"
    reasons = "; ".join(f"{reason or 'no reason given'} ({count})" for reason, count in judge["unscored_reasons"].items())
    yield "Not scored", number(judge["unscored"]) + (f": {reasons}" if reasons else "")
    if judge["not_asked"]:
        yield "Never asked, as it was stopped", f"{number(judge['not_asked'])} of {number(judge['pairs'])} pairs of answers"
    if judge["prompt_tokens"]:
        yield "Tokens read and written", f"{number(judge['prompt_tokens'])} and {number(judge['completion_tokens'])}"
        cost = judge["cost_usd"]
        yield "Cost", "unknown (no price in the config)" if cost is None else f"{cost:.2f} USD"
    if any(judge["rubric_sha"]):
        yield "Rubric (hash)", ", ".join(judge["rubric_sha"])


def _told(told: Finding) -> Iterator[tuple[str, Any]]:
    """What the judge stage knows of a judge beside its verdicts, as far as it says so."""
    if told.get("file"):
        yield "Imported from", told["file"]
    if told.get("annotators"):
        yield "Annotators", number(told["annotators"])
    if told.get("family_of"):
        yield "Of the same family as", f"{told['family_of']}: judges are said to prefer their own kind"
    if told.get("stopped"):
        yield "Stopped", told["stopped"]
    if told.get("flagged"):
        yield "Flagged verdicts", number(told["flagged"])
    if len(names := told.get("answered_as") or {}) > 1:
        listed = ", ".join(f"{model} ({number(count)} replies)" for model, count in sorted(names.items()))
        yield "Answered as several models", f"{listed}: its name was moved in between"


def jury_sentences(judging: list[Finding]) -> list[str]:
    """Return one sentence for each pair of models that a jury judged: how far its members agree."""
    return [
        f"{capital(name(entry['model_a']))} against {name(entry['model_b'])}: Krippendorff's alpha of the judges is "
        f"{_alpha(entry['jury'])}, on {entry['jury']['num']} questions that at least two of them scored."
        for entry in judging
        if entry.get("jury") and entry["jury"]["num"]
    ]


def _alpha(jury: Finding) -> str:
    if jury["alpha"] is None:
        return "undefined"
    return f"{number(jury['alpha'], 2)} ({number(jury['low'], 2)} to {number(jury['high'], 2)})"
