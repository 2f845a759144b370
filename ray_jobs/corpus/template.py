"""The model's own chat template: from questions to chats, from examples to token ids with the answer's tokens marked."""

import json
from pathlib import Path
from typing import NamedTuple

from ray_jobs.core.errors import ModelError


class Encoded(NamedTuple):
    """Token ids of one example; the first `num_untrained` are read but not learnt."""

    input_ids: list[int]
    num_untrained: int
    labels: list[int] | None = None
    """Labels of their own, one a token; none learns the tokens themselves."""
    segment_lengths: list[int] | None = None
    """Lengths of the texts that the example is made of; none is one text."""


def chat_messages(question: str, system_prompt: str = "") -> list[dict[str, str]]:
    """Return the chat of one question; an empty system prompt leaves the template its own."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def require_chat_template(folder: Path, name: str) -> None:
    """Refuse a model whose tokenizer has no chat template, by its files alone.

    Args:
        name: as the config names the model.

    Raises:
        ModelError: no template.
    """
    config = folder / "tokenizer_config.json"
    has_field = config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
    if not has_field and not (folder / "chat_template.jinja").is_file():
        raise ModelError(
            f"model {name!r} has no chat template in {folder} (looked for chat_template.jinja and tokenizer_config.json): "
            "take its instruct version, or save a template there"
        )


class ChatTemplate:
    """Encodes examples for one model.

    Args:
        folder: model folder with its tokenizer.
        system_prompt: of every pair.
    """

    def __init__(self, folder: str | Path, *, system_prompt: str = ""):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.system_prompt = system_prompt
        added = self._tokenizer.added_tokens_decoder.items()
        self._special_ids = {*self._tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}

    def count(self, text: str) -> int:
        """Return the tokens of plain text as `encode_text` makes them."""
        return len(self._tokenizer(text, verbose=False).input_ids)

    def encode_text(self, text: str) -> Encoded:
        """Return plain text with all tokens trained but the first."""
        return Encoded(self._tokenizer(text, verbose=False).input_ids, 1)

    def encode_pair(self, question: str, answer: str) -> Encoded:
        """Return a chat with the answer's tokens and the end of its turn trained, and nothing else.

        The prompt's tokens are those that generation starts from.

        Raises:
            ModelError: the template does not keep the prompt when the answer is added.
        """
        asked = chat_messages(question, self.system_prompt)
        prompt = self._render(asked, add_generation_prompt=True)
        whole = self._render([*asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ModelError(
                f"chat template of {self._tokenizer.name_or_path!r} writes another prompt once an answer follows: "
                f"{prompt[-80:]!r} is not kept; use a template whose generation prompt begins the assistant's turn"
            )
        prompt_ids, whole_ids = self._ids(prompt), self._ids(whole)
        if whole_ids[: len(prompt_ids)] != prompt_ids:  # a merge across the border: keep the prompt as generation sees it
            whole_ids = prompt_ids + self._ids(whole[len(prompt) :])
        return Encoded(self._end_turn(whole_ids, len(prompt_ids)), len(prompt_ids))

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _end_turn(self, ids: list[int], num_prompt: int) -> list[int]:
        """Cut what the template writes after the end of the turn; where it writes no end, end with the tokenizer's."""
        for end in range(len(ids), num_prompt, -1):
            if ids[end - 1] in self._special_ids:
                return ids[:end]
        return ids if self._tokenizer.eos_token_id is None else [*ids, self._tokenizer.eos_token_id]
