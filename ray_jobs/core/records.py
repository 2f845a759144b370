"""The rows that stages hand to each other. Ids are content hashes; a failure is a row with a reason."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ray_jobs.core.errors import DataError

SCHEMA_VERSION = 1
Winner = Literal["a", "b", "tie"]
OFFLINE, JURY, HUMAN = "coverage", "jury", "human"
"""Names of judges in the rows: no language model at all, the majority of several, and people."""


def content_id(*parts: object) -> str:
    """Return a 16-hex-digit id of the parts: equal parts give equal ids on every machine."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Record(BaseModel):
    """Base of all rows: frozen, unknown keys refused, versioned."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA_VERSION


def check_version(rows: Iterable[Mapping[str, Any]], *, place: str) -> None:
    """Refuse rows that another version of this program wrote; rows that name no version are of this one.

    Args:
        place: the file, for the message.

    Raises:
        DataError: a row is of another schema version.
    """
    other = next((row["schema_version"] for row in rows if row.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION), None)
    if other is not None:
        raise DataError(
            f"{place} has rows of schema version {other!r}, and this program reads {SCHEMA_VERSION}: "
            "make its stage anew with --force; replies that were paid for are kept"
        )


class Pair(Record):
    """A training question with its answer."""

    pair_id: str
    question: str
    answer: str
    topic: str = ""
    language: str = "en"
    source: str = ""


class Text(Record):
    """A text that an encoder learns on, with its class where it has one."""

    text_id: str
    text: str
    label: str = ""
    source: str = ""


class Question(Record):
    """An evaluation question with the sample answer a lecturer would sign."""

    question_id: str
    question: str
    reference: str
    topic: str = ""
    language: str = "en"


class Answer(Record):
    """What one model answered; `finish_reason` is stop, length or error (then `error` says why).

    `latency_s` is the seconds of the batch divided by its rows: a share of work, not how long anyone waited.
    """

    answer_id: str
    question_id: str
    model: str
    text: str
    finish_reason: Literal["stop", "length", "error"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    error: str = ""


class Similarity(Record):
    """Similarities of one answer to its sample answer; None where no score can be given (`reason`)."""

    answer_id: str
    question_id: str
    model: str
    cosine: float | None
    sif_cosine: float | None
    token_f1: float | None
    oov_share: float
    num_tokens: int
    reason: str = ""
    soft_cosine: float | None = None
    content_f1: float | None = None


class Verdict(Record):
    """One judge's word on one pair of answers, in one order; `winner` is None where unscored, `flag` says what makes a verdict doubtful."""

    verdict_id: str
    question_id: str
    answer_a: str
    answer_b: str
    model_a: str
    model_b: str
    judge: str
    rubric_sha: str
    swapped: bool = False
    repeat: int = 0
    winner: Winner | None
    unscored: str = ""
    explanation: str = ""
    raw: str = ""
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)
    cost_usd: float | None = None
    flag: str = ""


class Comparison(Record):
    """One line of the final table: a question, both answers, who won by judge and by similarity."""

    question_id: str
    topic: str
    language: str
    model_1: str
    model_2: str
    judge: str
    question: str
    sample_answer: str
    answer_1: str
    answer_2: str
    llm_winner: Literal["1", "2", "tie", "unscored"]
    similarity_1: float | None
    similarity_2: float | None
    cos_winner: Literal["1", "2", "tie", "unscored"]
    explanation: str
