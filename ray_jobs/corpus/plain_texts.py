"""Texts as encoders read them: no chat template, each text between its special tokens, labels as the task needs them."""

from pathlib import Path

from ray_jobs.core.errors import DataError
from ray_jobs.corpus.packing import IGNORE
from ray_jobs.corpus.template import Encoded

NO_CLASS = -1
"""Label of a text that counts and has no class."""


class PlainTexts:
    """Encodes examples for one encoder.

    Labels say which positions the loss counts: for masked_language_model all but the special tokens; for embedding and
    classification the last token of each text (its label is the class, NO_CLASS, or 0 for embeddings).

    Args:
        folder: model folder with its tokenizer.
        task: masked_language_model, embedding or classification.
        max_length: tokens of one packed row; longer texts are cut, as the encoder's users cut them.
    """

    def __init__(self, folder: str | Path, *, task: str, max_length: int):
        from transformers import AutoConfig, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._special_ids = set(self._tokenizer.all_special_ids)
        self._task, self._max_length = task, max_length
        self._classes = AutoConfig.from_pretrained(folder).label2id

    def count(self, text: str) -> int:
        """Return the tokens of a text."""
        return len(self._tokenizer(text, verbose=False).input_ids)

    def encode_text(self, text: str, *, label: str = "") -> Encoded:
        """Return one text, cut to a row.

        Args:
            label: name or number of a class of the model; empty for none.

        Raises:
            DataError: the model has no such class.
        """
        return self._join([self._ids(text, self._max_length)], self._class(label))

    def encode_pair(self, question: str, answer: str) -> Encoded:
        """Return two texts; a long question is cut to half a row, a long answer to what is left of it."""
        question_ids = self._ids(question, self._max_length // 2)
        return self._join([question_ids, self._ids(answer, self._max_length - len(question_ids))], NO_CLASS)

    def _ids(self, text: str, max_length: int) -> list[int]:
        return self._tokenizer(text, truncation=True, max_length=max_length, verbose=False).input_ids

    def _join(self, texts: list[list[int]], label: int) -> Encoded:
        labels = [each for ids in texts for each in self._labels(ids, label)]
        return Encoded([token for ids in texts for token in ids], 1, labels, [len(ids) for ids in texts])

    def _labels(self, ids: list[int], label: int) -> list[int]:
        if self._task == "masked_language_model":
            return [IGNORE if token in self._special_ids else token for token in ids]
        return [IGNORE] * (len(ids) - 1) + [label if self._task == "classification" else 0]

    def _class(self, label: str) -> int:
        if not label or self._task != "classification":
            return NO_CLASS
        if label in self._classes:
            return self._classes[label]
        if label.isdigit() and int(label) in self._classes.values():
            return int(label)
        known = ", ".join(f"{name} ({index})" for name, index in self._classes.items())
        raise DataError(f"label {label!r} is no class of the teacher, which knows {known}")
