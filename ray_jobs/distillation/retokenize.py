"""A batch in the teacher's tokens once more in the student's: the same text, the same trained part, and where both have read equally much.

Shapes: B rows, T and S positions in the teacher's and the student's tokens, M aligned positions.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_jobs.core.models import resolve_model
from ray_jobs.training.batches import IGNORE, Batch, Row, collate
from ray_jobs.training.models import load_tokenizer


class Retokenized(NamedTuple):
    """The student's batch, and aligned positions as indices into each model's own valid positions."""

    batch: Batch
    teacher_at_M: Tensor
    student_at_M: Tensor


class Segment(NamedTuple):
    """One example in the student's tokens; `pairs` are (teacher, student) places in it that have read the same text."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


class Retokenizer:
    """Builds the student's batches on a worker from the text that the teacher's token ids stand for.

    Special tokens of the teacher stand in the text as they are written, such as <|im_start|>, and the student reads
    them as plain text; so the teacher's chat template renders, for the student too, what it was trained on. Two become
    the student's own: a beginning-of-text token that the template names by its role, and the token that ends a trained
    answer, which becomes the student's end of text, so that generation stops.

    Args:
        teacher: tokenizer of the packed rows.
        student: a fast tokenizer, which knows the characters of its tokens.
        max_length: positions of the student; longer examples are cut.
    """

    def __init__(self, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *, max_length: int):
        self._teacher, self._student, self._max_length = teacher, student, max_length
        added = teacher.added_tokens_decoder.items()
        # only such a template writes the student's own once the student has it
        self._begins = teacher.bos_token_id if student.bos_token_id is not None and "bos_token" in (teacher.chat_template or "") else None
        self._special = {*teacher.all_special_ids, *(token_id for token_id, token in added if token.special)}
        self.segment = functools.lru_cache(maxsize=8192)(self._segment)

    def __call__(self, batch: Batch) -> Retokenized:
        """Return the student's batch on the batch's device."""
        rows, teacher_at, student_at = [], [], []
        teacher_valid = student_valid = 0  # places count over the whole batch, as `valid_hidden` does
        for ids_T, positions_T, labels_T in zip(*(tensor.cpu().numpy() for tensor in _parts(batch)), strict=True):
            starts = [*np.flatnonzero(positions_T == 0), len(ids_T)]
            made = [(int(a), self._made(ids_T[a:b], labels_T[a:b])) for a, b in itertools.pairwise(starts)]
            made = [(start, segment) for start, segment in made if segment is not None]
            row = _join([segment for _, segment in made])
            theirs, mine = _places(labels_T, teacher_valid), _places(row.labels, student_valid)
            offset = 0
            for start, segment in made:
                teacher_at += [int(theirs[start + i]) for i, _ in segment.pairs]
                student_at += [int(mine[offset + j]) for _, j in segment.pairs]
                offset += len(segment.input_ids)
            teacher_valid += int((labels_T[1:] != IGNORE).sum())
            student_valid += int((row.labels[1:] != IGNORE).sum())
            rows.append(row)
        device = batch.input_ids_BT.device
        places = (torch.tensor(at, dtype=torch.long, device=device) for at in (teacher_at, student_at))
        return Retokenized(collate(rows).to(device), *places)

    def _made(self, ids: np.ndarray, labels: np.ndarray) -> Segment | None:
        """Return a segment in the student's tokens; None for padding and for text without a trained token."""
        trained = np.flatnonzero(labels != IGNORE)
        return self.segment(tuple(ids.tolist()), int(trained[0])) if len(trained) else None

    def _segment(self, ids: tuple[int, ...], num_untrained: int) -> Segment:
        """Return one example.

        Args:
            ids: the teacher's tokens.
            num_untrained: tokens at the start that are read but not learnt; at least 1.
        """
        begins = int(ids[0] == self._begins)
        ends = int(ids[-1] in self._special and len(ids) > num_untrained and self._student.eos_token_id is not None)
        text, ends_at = self._read(ids, begins, len(ids) - ends)
        encoded: Any = self._student(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        own_ids, spans = list(encoded.input_ids), [tuple(span) for span in encoded.offset_mapping]
        learnt_from = max((end for place, end in ends_at.items() if place < num_untrained), default=0)
        labels = [token if start >= learnt_from and end > start else IGNORE for token, (start, end) in zip(own_ids, spans, strict=True)]
        own_ids = [self._student.bos_token_id] * begins + own_ids + [self._student.eos_token_id] * ends
        labels = [IGNORE] * begins + labels + [self._student.eos_token_id] * ends
        labels[0] = IGNORE
        own_ids, labels = own_ids[: self._max_length], labels[: self._max_length]
        own_ends = {end: place + begins for place, (_, end) in enumerate(spans)}
        pairs = [
            (place, own_ends[end])
            for place, end in _last_places(ends_at).items()
            if end in own_ends and num_untrained - 1 <= place < len(ids) - 1
        ]
        learnt = [(i, j) for i, j in pairs if j + 1 < len(labels) and labels[j + 1] != IGNORE]
        return Segment(tuple(own_ids), tuple(labels), tuple(learnt))

    def _read(self, ids: tuple[int, ...], start: int, stop: int) -> tuple[str, dict[int, int]]:
        """Return the text of ids[start:stop], and at each of these places how many characters have been read.

        Places within a character of several tokens are left out.
        """
        text = self._decode(ids[start:stop])
        ends_at = {}
        for place in range(start, stop):
            read = self._decode(ids[start : place + 1])
            if text.startswith(read):
                ends_at[place] = len(read)
        return text, ends_at

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self._teacher.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def retokenizer_between(teacher: str, student: str, *, max_length: int) -> Retokenizer:
    """Return the retokenizer of two models by their names, as `resolve_model` takes them."""
    return Retokenizer(*(load_tokenizer(resolve_model(name)) for name in (teacher, student)), max_length=max_length)


def _parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT


def _last_places(ends_at: dict[int, int]) -> dict[int, int]:
    """Return {place: characters read}, of places that have read equally much the last."""
    return {place: end for end, place in {end: place for place, end in ends_at.items()}.items()}


def _places(labels: np.ndarray, before: int) -> np.ndarray:
    """Return which valid position each place is, counted on from those before."""
    valid = np.append(labels[1:] != IGNORE, False)
    return before + np.cumsum(valid) - 1


def _join(segments: list[Segment]) -> Row:
    if not segments:  # a row that counts nothing
        return Row(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, IGNORE))
    ids, labels = (np.concatenate([getattr(segment, name) for segment in segments]) for name in ("input_ids", "labels"))
    return Row(ids, np.concatenate([np.arange(len(segment.input_ids)) for segment in segments]), labels)
