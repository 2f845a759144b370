"""Who meets whom: both orders of each pair of answers, what a rule settles, and two games -> one result.

In every row `a` is the first model of the pair and `winner` names a model's side, never a position:
`swapped` says that the judge read `b` first. Explanations call the answers 1 (a) and 2 (b).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ray_jobs.core.errors import ConfigError, DataError
from ray_jobs.core.records import Verdict, Winner, content_id
from ray_jobs.judging.agreement import majority
from ray_jobs.judging.rubric import neutral

Row = dict[str, Any]
NOT_ASKED = "not asked: "
"""How the reason begins of a game that a stop left out: no fault of its judge."""
_OTHER: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}


class Game(NamedTuple):
    """One pair of answers to one question, in one order; asked for the first time where `repeat` is 0."""

    question_id: str
    question: str
    reference: str
    model_a: str
    model_b: str
    answer_a: str
    answer_b: str
    text_a: str
    text_b: str
    error_a: str
    error_b: str
    swapped: bool
    repeat: int = 0

    @property
    def shown(self) -> tuple[str, str]:
        """The two texts in the order in which the judge reads them."""
        return (self.text_b, self.text_a) if self.swapped else (self.text_a, self.text_b)

    def side(self, shown_winner: Winner) -> Winner:
        """Return the side that won, from the verdict on the shown order (a: first, b: second)."""
        return _OTHER[shown_winner] if self.swapped else shown_winner


class Ruling(NamedTuple):
    """What a judge, or a rule, says about one game; `winner` is None where `unscored` says why."""

    winner: Winner | None
    explanation: str = ""
    unscored: str = ""
    raw: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    flag: str = ""


class PairResult(NamedTuple):
    """One judge's result on one question and pair, over all orders.

    `consistent` is False where the orders disagree, or where an order's repeats have no majority: that counts as a tie.
    """

    question_id: str
    model_a: str
    model_b: str
    winner: Winner | None
    consistent: bool
    unscored: str
    explanation: str


def check_pairs(pairs: Sequence[tuple[str, str]], *, answering: Sequence[str]) -> None:
    """Refuse pairs that cannot meet.

    Args:
        pairs: (first model, second model).
        answering: the models that answer.

    Raises:
        ConfigError: there is no pair, one names a model that does not answer, or a model would meet itself.
    """
    if not pairs:
        raise ConfigError('[judge] pairs is empty: name at least one, like [["base", "teacher"]]')
    for model in sorted({model for pair in pairs for model in pair} - set(answering)):
        raise ConfigError(f"[judge] pairs name {model!r}, but [answer] models are {list(answering)}: add it there or drop the pair")
    for a, b in pairs:
        if a == b:
            raise ConfigError(f"[judge] pairs let {a!r} meet itself: name two models")


def make_games(questions: list[Row], answers: dict[str, list[Row]], pairs: Sequence[tuple[str, str]]) -> list[Game]:
    """Return two games, one for each order, of every question and pair; the games of a question are neighbours.

    Args:
        questions: Question rows.
        answers: {model: Answer rows}.
        pairs: (first model, second model).

    Raises:
        DataError: a model has no answer to a question, two, or an answer to one that is not asked; a question stands there twice.
    """
    if twice := _twice(questions):
        raise DataError(f"question_id {twice!r} stands twice in questions.jsonl: make it anew with `raystill prepare CONFIG --force`")
    by_question = {model: _of_questions(model, rows, questions) for model, rows in answers.items()}
    return [
        _game(question, by_question[a][question["question_id"]], by_question[b][question["question_id"]], swapped)
        for question in questions
        for a, b in pairs
        for swapped in (False, True)
    ]


def _of_questions(model: str, rows: list[Row], questions: list[Row]) -> dict[str, Row]:
    if twice := _twice(rows):
        raise DataError(f"model {model!r} has two answers to question_id {twice!r}: answer anew with `raystill answer CONFIG --force`")
    found = {row["question_id"]: row for row in rows}
    asked = [question["question_id"] for question in questions]
    odd = sorted(set(asked) ^ set(found))
    if odd:
        raise DataError(
            f"answers of {model!r} and the questions do not belong together ({len(odd)} of them, like question_id {odd[0]!r}): "
            "answer the questions again with `raystill answer CONFIG --force`"
        )
    return found


def _twice(rows: list[Row]) -> str | None:
    counts = Counter(row["question_id"] for row in rows)
    return next((question_id for question_id, count in counts.items() if count > 1), None)


def _game(question: Row, a: Row, b: Row, swapped: bool) -> Game:
    return Game(
        question_id=question["question_id"],
        question=question["question"],
        reference=question["reference"],
        model_a=a["model"],
        model_b=b["model"],
        answer_a=a["answer_id"],
        answer_b=b["answer_id"],
        text_a=a["text"],
        text_b=b["text"],
        error_a=_error(a),
        error_b=_error(b),
        swapped=swapped,
    )


def _error(answer: Row) -> str:
    return (answer.get("error") or "no reason given") if answer["finish_reason"] == "error" else ""


def repeated(games: Iterable[Game], times: int) -> list[Game]:
    """Return each game as often as it is to be asked, all first times before the second ones."""
    games = list(games)
    return [game._replace(repeat=repeat) for repeat in range(times) for game in games]


def settle(game: Game) -> Ruling | None:
    """Return the ruling that needs no judge: an answer that failed, or that is empty or identical as a judge is shown it; else None."""
    for side, model, error in (("1", game.model_a, game.error_a), ("2", game.model_b, game.error_b)):
        if error:
            return Ruling(None, unscored=f"answer {side} ({model}) failed: {error}")
    text_a, text_b = neutral(game.text_a), neutral(game.text_b)
    if text_a == text_b:
        return Ruling("tie", "Both answers are identical." if text_a else "Both answers are empty.")
    if not text_a:
        return Ruling("b", "Answer 1 is empty.")
    if not text_b:
        return Ruling("a", "Answer 2 is empty.")
    return None


def verdict_row(game: Game, ruling: Ruling, *, judge: str, rubric_sha: str) -> Row:
    """Return the Verdict row of a ruling."""
    models, order = (game.model_a, game.model_b), (game.swapped, game.repeat)
    return Verdict(
        verdict_id=content_id(game.question_id, game.answer_a, game.answer_b, *models, judge, rubric_sha, *order),
        question_id=game.question_id,
        answer_a=game.answer_a,
        answer_b=game.answer_b,
        model_a=game.model_a,
        model_b=game.model_b,
        judge=judge,
        rubric_sha=rubric_sha,
        swapped=game.swapped,
        repeat=game.repeat,
        **ruling._asdict(),
    ).model_dump()


def pair_results(verdicts: Iterable[Row], judge: str) -> list[PairResult]:
    """Return one result for each question and pair of one judge, in the order of the rows.

    A side wins when it wins in every order; in an order asked several times, by more than half of its verdicts, so that
    asking more often makes no more ties. Orders that disagree make a tie; one without any verdict leaves the pair unscored.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in verdicts:
        if row["judge"] == judge:
            groups.setdefault((row["question_id"], row["model_a"], row["model_b"]), []).append(row)
    return [_result(*key, rows) for key, rows in groups.items()]


def _result(question_id: str, model_a: str, model_b: str, rows: list[Row]) -> PairResult:
    rows = sorted(rows, key=lambda row: (row["swapped"], row["repeat"]))
    scored = [row for row in rows if row["winner"] is not None]
    unheard = {row["swapped"] for row in rows} - {row["swapped"] for row in scored}
    if unheard:
        missing = next(row for row in rows if row["swapped"] in unheard)
        return PairResult(question_id, model_a, model_b, None, True, missing["unscored"], "")
    by_order = [[row["winner"] for row in scored if row["swapped"] == swapped] for swapped in sorted({row["swapped"] for row in scored})]
    winner = majority(by_order[0])
    if all(2 * order.count(winner) > len(order) for order in by_order):
        return PairResult(question_id, model_a, model_b, winner, True, "", _told(next(row for row in scored if row["winner"] == winner)))
    within = {(row["swapped"], row["winner"]) for row in scored}
    cause = "depends on the order" if len(within) == len({row["swapped"] for row in scored}) else "is not the same each time"
    told = " ".join(f"[answer {'2' if row['swapped'] else '1'} read first] {_told(row)}" for row in scored)
    return PairResult(question_id, model_a, model_b, "tie", False, "", f"The verdict {cause}, so it counts as a tie. {told}")


def _told(row: Row) -> str:
    return f"{row['explanation']}\n[Flagged: {row['flag']}]" if row.get("flag") else row["explanation"]
