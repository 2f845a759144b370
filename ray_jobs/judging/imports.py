"""Verdicts from elsewhere as one more judge: people's labels of pairs, or another tool's scores of single answers.

Labels: question_id, model_a, model_b (or model_1, model_2), winner (a, b, 1, 2, tie, or a model's name; empty is not labelled), and
where there are any annotator, explanation, answer_a, answer_b (ids: a label of an answer that is no more is refused).
Scores: question_id (or sample_id, id), model, value (or score): a number, true, false, or inspect_ai's C, P, I, N.
"""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ray_jobs.core.errors import ConfigError, DataError
from ray_jobs.core.records import JURY, Verdict, Winner, content_id
from ray_jobs.judging.agreement import jury_agreement, majority
from ray_jobs.judging.pairs import Game
from ray_jobs.judging.results import METRICS
from ray_jobs.judging.table_lines import Line, read_lines

Row = dict[str, Any]
Key = tuple[str, str, str]
SUFFIXES = (".csv", ".jsonl")
_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "TRUE": 1.0, "FALSE": 0.0}
_SIDES: dict[str, Winner] = {"a": "a", "1": "a", "b": "b", "2": "b", "tie": "tie"}
_OTHER: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}


class Label(NamedTuple):
    """One annotator's word on a pair of models, from the side of the configured pair."""

    annotator: str
    winner: Winner
    explanation: str


class Imported(NamedTuple):
    """Verdict rows of an imported judge, facts for the manifest, and the hash of the file."""

    rows: list[Row]
    facts: Row
    sha256: str


def check_name(judge: str) -> None:
    """Refuse a name that the rows have for another.

    Raises:
        ConfigError: the jury or a metric bears it.
    """
    if judge in {JURY, *METRICS}:
        raise ConfigError(f"[judge] imports has a judge {judge!r}, as the jury or a metric is called: give it another name")


def read_import(content: bytes, *, name: str, judge: str, games: Sequence[Game]) -> Imported:
    """Return the verdicts of a file on the games of a run; what it has no word on has no row.

    Args:
        content: the file's bytes, UTF-8.
        name: the file's; .csv or .jsonl.
        judge: the judge's name in the rows.
        games: of the run.

    Raises:
        DataError: the file cannot be read, or a row names a question, model, answer or winner that the run does not have.
    """
    lines = read_lines(content, name=name)
    columns = list(dict.fromkeys(column for line in lines for column in line.values))
    if not {"winner", "value", "score"} & set(columns):
        seen = f"no verdict in its columns ({', '.join(columns)})" if lines else "no row in it"
        raise DataError(f"{name}: {seen}; give rows with question_id, model_a, model_b and winner, or question_id, model and value")
    met = {_key(game): game for game in games if not game.swapped}
    is_scores = "winner" not in columns
    rows, facts = _from_scores(lines, judge, met) if is_scores else _from_labels(lines, judge, met)
    facts = {"file": name, "kind": "scores" if is_scores else "labels", "lines": len(lines), **facts}
    return Imported(rows, facts, hashlib.sha256(content).hexdigest())


def _key(game: Game) -> Key:
    return game.question_id, game.model_a, game.model_b


def _questions(met: Mapping[Key, Game]) -> dict[str, None]:
    """The run's questions in their order; once for all lines of a file."""
    return dict.fromkeys(question_id for question_id, *_ in met)


def _question(line: Line, asked: Mapping[str, None]) -> str:
    found = line.get("question_id", "sample_id", "id")
    if found not in asked:
        raise line.fail(f"question_id {found!r} is none of the run's {len(asked)} questions (the first is {next(iter(asked), '')!r})")
    return found


def _from_labels(lines: list[Line], judge: str, met: Mapping[Key, Game]) -> tuple[list[Row], Row]:
    asked = _questions(met)
    labels: dict[Key, list[Label]] = {}
    for line in lines:
        if line.get("winner"):
            key, label = _label(line, met, asked)
            said = labels.setdefault(key, [])
            label = label if label.annotator else label._replace(annotator=f"#{len(said) + 1}")
            if label.annotator in {other.annotator for other in said}:
                raise line.fail(f"annotator {label.annotator!r} labels question {key[0]!r} a second time: leave one of both")
            said.append(label)
    rows = [_row(met[key], judge, majority(label.winner for label in said), _told(said)) for key, said in labels.items()]
    return rows, _annotators(labels)


def _label(line: Line, met: Mapping[Key, Game], asked: Mapping[str, None]) -> tuple[Key, Label]:
    question_id = _question(line, asked)
    a, b = line.get("model_a", "model_1"), line.get("model_b", "model_2")
    is_turned = (question_id, a, b) not in met
    key = (question_id, b, a) if is_turned else (question_id, a, b)
    if key not in met:
        pairs = sorted({f"{x} against {y}" for _, x, y in met})
        raise line.fail(f"models {a!r} and {b!r} do not meet in this run: it has {', '.join(pairs)}")
    game, ids = met[key], (line.get("answer_a"), line.get("answer_b"))
    for given, present in zip(reversed(ids) if is_turned else ids, (game.answer_a, game.answer_b), strict=True):
        if given and given != present:
            raise line.fail(f"answer {given!r} is no more: the run's answer to question {question_id!r} is {present!r}; label it anew")
    word = line.get("winner")
    named: dict[str, Winner] = {a: "a", b: "b"}
    side = _SIDES.get(word.lower()) or named.get(word)
    if side is None:
        raise line.fail(f"winner {word!r} was not offered: write a, b, tie, or the name of one of the two models")
    return key, Label(line.get("annotator"), _OTHER[side] if is_turned else side, line.get("explanation"))


def _told(said: list[Label]) -> str:
    counts = {word: sum(label.winner == side for label in said) for side, word in (("a", "answer 1"), ("b", "answer 2"), ("tie", "a tie"))}
    votes = ", ".join(f"{count} for {word}" for word, count in counts.items() if count)
    return "\n".join(
        [*([f"{len(said)} labels: {votes}"] if len(said) > 1 else []), *(label.explanation for label in said if label.explanation)]
    )


def _annotators(labels: Mapping[Key, list[Label]]) -> Row:
    names = list(dict.fromkeys(label.annotator for said in labels.values() for label in said))
    by_key = [{label.annotator: label.winner for label in said} for said in labels.values()]
    facts = {"labelled": len(labels), "labels": sum(map(len, labels.values())), "annotators": len(names)}
    agreed = jury_agreement([[said.get(name) for said in by_key] for name in names])._asdict() if len(names) > 1 else None
    return {**facts, "annotator_agreement": agreed}


def _from_scores(lines: list[Line], judge: str, met: Mapping[Key, Game]) -> tuple[list[Row], Row]:
    asked, models = _questions(met), {model for _, *pair in met for model in pair}
    scores: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        question_id, model = _question(line, asked), line.get("model")
        if model not in models:
            raise line.fail(f"model {model!r} does not meet another in this run: it has {', '.join(sorted(models))}")
        scores.setdefault((question_id, model), []).append(_value(line))
    mean = {key: statistics.fmean(values) for key, values in scores.items()}
    rows = []
    for (question_id, a, b), game in met.items():
        first, second = mean.get((question_id, a)), mean.get((question_id, b))
        if first is not None and second is not None:
            winner: Winner = "tie" if first == second else "a" if first > second else "b"
            rows.append(_row(game, judge, winner, f"Answer 1 scores {first:g}, answer 2 {second:g}."))
    return rows, {"labelled": len(rows), "scores": len(lines)}


def _value(line: Line) -> float:
    word = line.get("value", "score")
    if word.upper() in _LETTERS:
        return _LETTERS[word.upper()]
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise line.fail(f"value {word!r} is no score: write a number, true, false, or one of C, P, I, N")
    return value


def _row(game: Game, judge: str, winner: Winner | None, explanation: str) -> Row:
    return Verdict(
        verdict_id=content_id("imported", judge, game.question_id, game.answer_a, game.answer_b, winner, explanation),
        question_id=game.question_id,
        answer_a=game.answer_a,
        answer_b=game.answer_b,
        model_a=game.model_a,
        model_b=game.model_b,
        judge=judge,
        rubric_sha="",
        winner=winner,
        explanation=explanation,
    ).model_dump()
