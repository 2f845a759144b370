"""Do a judge's reasons name another winner than its verdict? Told by the plain sentences of German and English alone."""

import re

from ray_jobs.core.records import Winner

_OTHER: dict[str, Winner] = {"A": "b", "B": "a"}
_SAME: dict[str, Winner] = {"A": "a", "B": "b"}
_IS = r"\b(?:answer|antwort)\s+([AB])\s+(?:is|was|ist|war)\s+((?:[\wäöüß-]+\s+){0,3}?)"
_BETTER = re.compile(rf"{_IS}(?:better|superior|stronger|besser|überlegen|stärker)\b", re.IGNORECASE)
_WORSE = re.compile(rf"{_IS}(?:worse|inferior|weaker|schlechter|unterlegen|schwächer)\b", re.IGNORECASE)
_WINS = re.compile(r"\b(?:answer|antwort)\s+([AB])\s+()(?:wins|gewinnt)\b", re.IGNORECASE)
_EVEN = re.compile(
    r"\b(?:both|beide)\b[^.!?]{0,60}\b(?:equally|equal|gleich|gleichwertig)\b|\b(?:neither|keine\s+(?:der|von|antwort|ist|war))\b[^.!?]{0,40}\b(?:better|besser)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(r"\b(?:not|no|never|hardly|nicht|kaum|nie|kein)\b", re.IGNORECASE)


def winners_named(reasons: str) -> set[Winner]:
    """Return whom the reasons call the better one ("a" for answer A); empty where no sentence says it plainly."""
    found: set[Winner] = {"tie"} if _EVEN.search(reasons) else set()
    for pattern, side in ((_BETTER, _SAME), (_WINS, _SAME), (_WORSE, _OTHER)):
        found |= {side[label.upper()] for label, between in pattern.findall(reasons) if not _DENIES.search(between)}
    return found


def contradicts(reasons: str, winner: Winner) -> bool:
    """Return whether the reasons name a winner, and never this one.

    A judge that weighs point against point may name both; only one that names others alone contradicts itself.
    """
    named = winners_named(reasons)
    return bool(named) and winner not in named
