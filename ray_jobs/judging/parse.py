"""From a judge's raw reply to a verdict, or to the reason why there is none. Never raises on what a model wrote."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ray_jobs.core.records import Winner
from ray_jobs.judging.contradiction import contradicts

CUT = "the reply was cut at max_tokens"
CONTRADICTION = "the reasons name another winner than the verdict"
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading JSON of unknown shape can raise: numbers without end and brackets without end among it."""
_OFFERED: dict[str, Winner] = {"A": "a", "B": "b", "TIE": "tie"}
_LABEL = re.compile(r"\b(answers?|antwort(?:en)?) ([AB])\b(?:( (?:and|or|und|oder) )([AB])\b)?", re.IGNORECASE)


class Completion(NamedTuple):
    """A chat completion's parts that matter; `problem` says why there is no text to read."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""


class Opinion(NamedTuple):
    """What a judge says about the answers as it saw them (a: first, b: second); unscored where `winner` is None.

    `flag` says what makes the verdict doubtful.
    """

    winner: Winner | None
    explanation: str = ""
    unscored: str = ""
    flag: str = ""


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text; of one in parts, as reasoning models send it, the parts that are text."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [content]
    return "".join(text for part in parts if isinstance(text := part.get("text") if isinstance(part, dict) else part, str))


def well_formed(text: str) -> str:
    """Return the text as it can be written: JSON may hold half a pair of surrogates, UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def read_completion(body: str) -> Completion:
    """Return what the raw body of a chat completion says."""
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        text = text_of(choice["message"])
        usage = completion.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except UNREADABLE:
        return Completion(problem=f"the endpoint's reply is no chat completion: {body[:80]!r}")
    if choice.get("finish_reason") == "length":
        return Completion(text, *tokens, problem=f"{CUT}: raise it")
    if not text:
        return Completion(
            text, *tokens, problem=well_formed(f"empty reply: {choice['message'].get('refusal') or choice.get('finish_reason')}")
        )
    return Completion(text, *tokens)


def read_opinion(text: str, *, swapped: bool) -> Opinion:
    """Return the opinion in a reply: its last JSON object with a winner counts.

    An object echoed from an answer stands before the verdict, so the last one is the judge's own.

    Args:
        text: the reply.
        swapped: whether "answer A" was answer 2 of the pair; the explanation says 1 and 2.
    """
    found = [item for item in _objects(text) if "winner" in item]
    if not found:
        return Opinion(None, unscored=f"no verdict in the reply: {text[:80]!r}")
    last = found[-1]
    winner = _OFFERED.get(str(last["winner"]).strip().upper())
    if winner is None:
        return Opinion(None, unscored=f"the reply names a winner that was not offered: {last['winner']!r}")
    explanation = _explanation(last, swapped)
    if not explanation:
        return Opinion(None, unscored="the reply gives no reasons")
    flag = CONTRADICTION if contradicts(str(last.get("reasoning") or ""), winner) else ""
    return Opinion(winner, explanation, flag=flag)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            item, end = decoder.raw_decode(text, start)
            yield item
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)


def _explanation(verdict: dict[str, Any], swapped: bool) -> str:
    lines = [_relabel(str(verdict.get("reasoning") or "").strip(), swapped)]
    for side in ("b", "a") if swapped else ("a", "b"):
        number = _number(side, swapped)
        for kind, label in (("missing", "Missing in"), ("wrong", "Wrong in")):
            points = verdict.get(f"{kind}_{side}")
            if isinstance(points, list) and points:
                lines.append(f"{label} answer {number}: {'; '.join(map(str, points))}.")
    return well_formed("\n".join(line for line in lines if line))


def _relabel(text: str, swapped: bool) -> str:
    def numbered(match: re.Match[str]) -> str:
        name, first, between, second = match.groups()
        pair = f"{between}{_number(second, swapped)}" if second else ""
        return f"{name} {_number(first, swapped)}{pair}"

    return _LABEL.sub(numbered, text)


def _number(label: str, swapped: bool) -> str:
    return "1" if (label.lower() == "a") != swapped else "2"
