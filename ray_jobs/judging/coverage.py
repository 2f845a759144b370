"""The offline judge: which statements of the sample answer does each answer cover?

It needs no key and pretends no understanding: it compares sentence embeddings, so it cannot see a wrong claim
that is worded like a right one. What it says can be checked line by line in its explanation.

Shape letters: S statements of the sample answer, A sentences of an answer, D width of the embeddings.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_jobs.core.records import Winner, content_id
from ray_jobs.judging.pairs import Game, Ruling, settle

Encode = Callable[[list[str]], NDArray[np.float32]]
SPLITTER_VERSION = 1
MIN_WORDS = 3
ENGLISH_ENCODERS = ("minilm-l6",)
"""Built-in sentence encoders that were trained on English alone."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'“„(]?[A-ZÄÖÜ0-9])")
_ENDS_IN_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|bzw|ca|Nr|No|Fig|Abb)|\b(?:z\.\s?B|d\.\s?h|u\.\s?a|s\.\s?o))\.$")
_ITEM = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
_INLINE_ITEM = re.compile(r"\s+(?=\((?:\d{1,2}|[a-z]|i{1,3}|iv|v)\)\s)")


class Coverage(NamedTuple):
    """How well one answer covers each statement: its best cosine, and whether that passes the threshold."""

    best_S: NDArray[np.float32]
    covered_S: NDArray[np.bool_]

    @property
    def score(self) -> float:
        """Mean of soft coverage (best cosines, from 0 to 1) and hard coverage (share of covered statements)."""
        return float((np.clip(self.best_S, 0, 1).mean() + self.covered_S.mean()) / 2)


def statements(text: str) -> list[str]:
    """Return the statements of a text: its sentences, list items and the clauses between semicolons.

    A piece of fewer than three words says nothing alone and stays with its predecessor. A text that is not blank
    has at least one statement.
    """
    pieces: list[str] = []
    for line in text.splitlines():
        for part in _INLINE_ITEM.split(_ITEM.sub("", line)):
            for sentence in _sentences(part):
                pieces += re.split(r";\s+", sentence)
    return _join_short(piece.strip() for piece in pieces if piece.strip()) or [text.strip()] * bool(text.strip())


def _sentences(text: str) -> list[str]:
    joined: list[str] = []
    for piece in _SENTENCE_END.split(text):
        if joined and _ENDS_IN_ABBREVIATION.search(joined[-1]):
            joined[-1] += f" {piece}"
        else:
            joined.append(piece)
    return joined


def _join_short(pieces: Iterable[str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and min(len(piece.split()), len(joined[-1].split())) < MIN_WORDS:
            joined[-1] += f" {piece}"
        else:
            joined.append(piece)
    return joined


def cover(statements_SD: NDArray[np.float32], sentences_AD: NDArray[np.float32], *, threshold: float) -> Coverage:
    """Return how well sentences cover statements; all embeddings have length 1."""
    best_S = (statements_SD @ sentences_AD.T).max(axis=1)
    return Coverage(best_S, best_S >= threshold)


def compare(first: Coverage, second: Coverage, *, margin: float) -> Winner:
    """Return which answer covers more: a the first, b the second, a tie up to `margin` of the scores."""
    if abs(first.score - second.score) <= margin:
        return "tie"
    return "a" if first.score > second.score else "b"


def explain(said: list[str], one: Coverage, two: Coverage) -> str:
    """Return in plain words which statements both answers, one of them, or neither covers."""
    lines = [
        f"Of {len(said)} statements in the sample answer, answer 1 covers {one.covered_S.sum()} "
        f"(score {one.score:.2f}) and answer 2 covers {two.covered_S.sum()} (score {two.score:.2f})."
    ]
    groups = {
        "Both cover": one.covered_S & two.covered_S,
        "Only answer 1 covers": one.covered_S & ~two.covered_S,
        "Only answer 2 covers": ~one.covered_S & two.covered_S,
        "Missing from both": ~one.covered_S & ~two.covered_S,
    }
    lines += [f"{label}: {_quoted(said, chosen)}" for label, chosen in groups.items() if chosen.any()]
    return "\n".join(lines)


def _quoted(said: list[str], chosen_S: NDArray[np.bool_]) -> str:
    return " · ".join(f"“{text}”" for text, is_chosen in zip(said, chosen_S, strict=True) if is_chosen)


class CoverageJudge:
    """Judges games by covered statements. Deterministic, and symmetric in the order of the answers.

    Args:
        encode: texts -> unit embeddings (N, D).
        threshold: cosine from which a statement counts as covered.
        margin: difference of the scores up to which a game is a tie.
    """

    def __init__(self, encode: Encode, *, threshold: float, margin: float):
        self._encode = encode
        self._threshold = threshold
        self._margin = margin

    def judge(self, games: list[Game]) -> list[Ruling]:
        """Return the ruling on each game; each distinct sentence is embedded once."""
        rulings = [settle(game) for game in games]
        open_games = [game for game, ruling in zip(games, rulings, strict=True) if ruling is None]
        embedded = self._embed({text for game in open_games for text in (game.reference, game.text_a, game.text_b)})
        return [ruling or self._rule(game, embedded) for game, ruling in zip(games, rulings, strict=True)]

    def _embed(self, texts: set[str]) -> dict[str, NDArray[np.float32]]:
        sentences = {text: statements(text) for text in sorted(texts)}
        distinct = sorted({sentence for parts in sentences.values() for sentence in parts})
        vectors = dict(zip(distinct, self._encode(distinct), strict=True)) if distinct else {}
        return {text: np.stack([vectors[sentence] for sentence in parts]) for text, parts in sentences.items()}

    def _rule(self, game: Game, embedded: dict[str, NDArray[np.float32]]) -> Ruling:
        sample_SD = embedded[game.reference]
        first, second = (cover(sample_SD, embedded[text], threshold=self._threshold) for text in game.shown)
        one, two = (second, first) if game.swapped else (first, second)
        return Ruling(game.side(compare(first, second, margin=self._margin)), explain(statements(game.reference), one, two))


def rubric_sha(model: str, *, threshold: float, margin: float) -> str:
    """Return the hash of everything that decides a verdict of the coverage judge."""
    return content_id("coverage", SPLITTER_VERSION, model, threshold, margin)
