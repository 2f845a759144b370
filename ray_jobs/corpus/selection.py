"""Which examples stay: no repeats, nothing that the evaluation asks; and which of them are held out."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ray_jobs.core.records import Question, content_id
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.duplicates import NearDuplicates, signature
from ray_jobs.corpus.examples import Dropped, question_key
from ray_jobs.corpus.parts import read_part

SHARD_EXAMPLES = 4096
"""Examples that are packed together, by one worker."""
_COLUMNS = ["kind", "example_id", "where", "question_key", "signature"]


class Pick(NamedTuple):
    """An example that stays: its id, and where it is in the parts."""

    kind: str
    example_id: str
    part: str
    row: int


class Shard(NamedTuple):
    """One output file: examples in order, as (part, rows)."""

    split: str
    number: int
    picks: list[tuple[str, list[int]]]


class Selector:
    """Takes examples in order and keeps the first of each kind of repeat.

    Args:
        near_duplicate: similarity from which two chunks, or two pairs, count as the same.
        questions: the evaluation's; a pair with the same question, or much the same text, is dropped
            (`leaks.drop_leaks` has dropped what holds a part of a sample answer).
    """

    def __init__(self, *, near_duplicate: float, questions: list[Question]):
        self._kept = {kind: NearDuplicates(near_duplicate) for kind in ("chunk", "pair", "text")}
        self._ids: set[str] = set()
        self._asked = NearDuplicates(near_duplicate)
        self._asked_keys = {question_key(question.question) for question in questions}
        for question in questions:
            self._asked.add(question.question_id, signature(f"{question.question}\n{question.reference}"))

    def reason_to_drop(self, example: dict[str, Any]) -> str | None:
        """Return why an example goes, or None and keep it."""
        if example["question_key"] in self._asked_keys or self._asked.find(example["signature"]):
            return "evaluation question"
        kept = self._kept[example["kind"]]
        if kept.find(example["signature"]):
            return "near-duplicate"
        if example["example_id"] in self._ids:
            return "duplicate id"
        self._ids.add(example["example_id"])
        kept.add(example["example_id"], example["signature"])
        return None


def select(storage: Storage, parts: Iterable[str], selector: Selector) -> tuple[list[Pick], list[Dropped]]:
    """Return what stays of the parts, in order, and what goes. Reads ids and signatures, no text."""
    picks, dropped = [], []
    for part in parts:
        for row, example in enumerate(read_part(storage, part, _COLUMNS).to_pylist()):
            reason = selector.reason_to_drop(example)
            if reason:
                dropped.append(Dropped(reason, example["where"]))
            else:
                picks.append(Pick(example["kind"], example["example_id"], part, row))
    return picks, dropped


def hold_out(ids: list[str], share: float) -> set[str]:
    """Return the ids held out: those whose hash falls in the first `share`, whatever else is there.

    With a share above 0 and two ids or more, at least one is held out.
    """
    place = {example_id: int(content_id("held out", example_id), 16) / 2**64 for example_id in ids}
    chosen = {example_id for example_id in ids if place[example_id] < share}
    return chosen or ({min(ids, key=place.__getitem__)} if share > 0 and len(ids) > 1 else set())


def plan_shards(picks: list[Pick], *, eval_share: float) -> list[Shard]:
    """Return the output files: the same for the same examples, whatever ran where; each split has at least one."""
    held_out = hold_out([pick.example_id for pick in picks], eval_share)
    shards = []
    for split in ("train", "eval"):
        mine = [pick for pick in picks if (pick.example_id in held_out) == (split == "eval")]
        for number, start in enumerate(range(0, max(1, len(mine)), SHARD_EXAMPLES)):
            shards.append(Shard(split, number, by_part(mine[start : start + SHARD_EXAMPLES])))
    return shards


def by_part(picks: Iterable[Pick]) -> list[tuple[str, list[int]]]:
    """Return (part, rows) of picks, in order."""
    rows: dict[str, list[int]] = {}
    for pick in picks:
        rows.setdefault(pick.part, []).append(pick.row)
    return list(rows.items())
