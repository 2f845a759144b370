"""The report's first sentence: what the run shows, how surely, and what speaks against it."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.core.records import HUMAN, JURY, OFFLINE
from ray_jobs.judging.judge_verdict import MIN_HUMAN_LABELS
from ray_jobs.reporting.numbers_in_words import number, p_value, percent
from ray_jobs.reporting.sentences import capital, noun, relation, score, who_judges

Finding = Mapping[str, Any]
_RANK = {"usable": 0, "weak": 1, "unusable": 2}


def leading_judge(judges: Sequence[Finding]) -> str | None:
    """Return the judge whose word opens the report.

    People, where they labelled enough questions to condemn a judge; else the most usable judge, the jury first and the
    offline judge last, in the order of the verdicts.
    """
    ranked = sorted(judges, key=_rank)
    return ranked[0]["judge"] if ranked else None


def speaking_matches(matches: Sequence[Finding], judges: Sequence[Finding]) -> list[Finding]:
    """Return for each pair of models the row of the first judge, as `leading_judge` ranks them, that scored a question of it."""
    place = {judge["judge"]: i for i, judge in enumerate(sorted(judges, key=_rank))}
    found: dict[tuple[str, str], list[Finding]] = {}
    for match in matches:
        if match["judge"]:
            found.setdefault((match["model_1"], match["model_2"]), []).append(match)
    return [min(rows, key=lambda row: (not row["wins_1"] + row["wins_2"] + row["ties"], place[row["judge"]])) for rows in found.values()]


def _rank(judge: Finding) -> tuple[bool, int, bool, bool, bool]:
    name, card = judge["judge"], judge["card"]
    has_labels = name == HUMAN and card["num_questions"] >= MIN_HUMAN_LABELS
    return not has_labels, _RANK[card["usability"]["word"]], name == HUMAN, name == OFFLINE, name != JURY


def answer_sentence(match: Finding, similarity: Finding | None, usability: Finding) -> str:
    """Return one sentence: the claim, a colon, and what it rests on.

    Args:
        match: of the leading judge on the first pair.
        similarity: the same pair by word-vector similarity, where it was scored.
        usability: the leading judge's `word` and `reasons`.
    """
    second, first = noun(match["model_2"]), noun(match["model_1"])
    reason = f" ({usability['reasons'][0]})" if usability["reasons"] else ""
    if usability["word"] == "unusable" and match["p_value"] is not None:
        doubt = f"{who_judges(match['judge'])} is unusable{reason}, so its {score(match)} says nothing"
        return f"Whether the {second} is better than the {first} is not shown: {doubt}."
    evidence = [_figures(match)]
    if match["questions_asked"] and relation(match).startswith("is not"):
        evidence.append(f"a difference like this would show with about {number(match['questions_asked'])} questions")
    if similarity is not None and (contrast := _contrast(match, similarity)):
        evidence.append(contrast)
    if usability["word"] == "weak" and not relation(match).startswith("is not"):
        evidence.append(f"but the judge is weak{reason}")
    return f"The {second} {relation(match)} the {first}: {'; '.join(evidence)}."


def _figures(match: Finding) -> str:
    if match["win_rate"] is None:
        return f"{match['measure']} {score(match)}, nothing was decided"
    interval = f"{percent(match['win_rate'])} of the decided, interval {percent(match['low'])} to {percent(match['high'])}"
    return f"{match['measure']} {score(match)} ({interval}), {p_value(match['p_value'])}"


def _contrast(match: Finding, similarity: Finding) -> str:
    """Return what similarity says where it is another thing than what the judge says, else ""."""
    if similarity["p_value"] is None or match["win_rate"] is None:
        return ""
    opposite = (match["win_rate"] - 0.5) * (similarity["win_rate"] - 0.5) < 0
    if relation(match) == relation(similarity) and not opposite:
        return ""
    word = "similarity leans the other way" if opposite else f"by similarity it {relation(similarity).removesuffix(' than')}"
    return f"{word}, {score(similarity)}, {p_value(similarity['p_value'])}"


def coverage_sentences(judges: Sequence[Finding]) -> list[str]:
    """Return one sentence for each judge that was not asked everything, as its budget was spent."""
    return [
        f"{capital(who_judges(judge['judge']))} was asked about {number(judge['pairs'] - judge['not_asked'])} of "
        f"{number(judge['pairs'])} pairs of answers before it was stopped: the rest are not scored, and its figures stand for what it saw."
        for judge in judges
        if judge["not_asked"]
    ]
