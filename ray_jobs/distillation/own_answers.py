"""Answers that the student itself writes to the prompts in packed rows, laid into rows like any others.

Shapes: B examples generated at once, P positions of the longest of their prompts, T with new ones, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ray_jobs.training.batches import IGNORE, Batch, Row, collate, join_rows
from ray_jobs.training.losses import causal_lm

SHORTEST_PROMPT = 2
"""Tokens before the first label that make a prompt: running text has all its tokens as labels but the first."""


class Writing(NamedTuple):
    """How answers are written."""

    max_new_tokens: int
    """Longest answer."""
    temperature: float
    """Of the sampling; above 0."""
    row_tokens: int
    """Tokens that a packed row may have."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end an answer, beside those of the model's own generation settings."""
    num_tokens: int | None = None
    """Tokens of the vocabulary; rows of the head beyond are padding and never drawn. None takes all."""


def rewrite(model: nn.Module, batch: Batch, writing: Writing, *, key: Sequence[int]) -> tuple[Batch, int]:
    """Return the batch with answers of the model's own, and how many tokens it wrote.

    Of each example its prompt stays, which is all before its first label. The new answer takes the place of the rest, and all
    of its tokens are labels. Examples stay in their rows, apart by their position ids; where a row's new answers are
    longer together than its room, the longest are cut, so that no row passes `row_tokens`. Examples without a prompt
    stay as they are. A row's answers depend on the model, the key and the row alone (to rounding), not on the batch around it.

    Args:
        model: on its device; in eval mode.
        batch: on the host.
        key: numbers that decide the draws.
    """
    rows = [_examples(row) for row in _rows(batch)]
    rooms = [_room(examples, writing) for examples in rows]
    asked = [(example, room) for examples, room in zip(rows, rooms, strict=True) for example in examples if _prompt(example)]
    written = iter(_write(model, asked, writing, key=key))
    taken = [[next(written) if _prompt(example) else None for example in examples] for examples in rows]
    laid = [_lay(*each) for each in zip(rows, taken, rooms, strict=True)]
    return collate([row for row, _ in laid]), sum(count for _, count in laid)


def _rows(batch: Batch) -> Iterator[Row]:
    columns = [column.numpy() for column in batch.columns if column is not None]
    for values in zip(*columns, strict=True):
        yield Row(*values)


def _examples(row: Row) -> list[Row]:
    """Return the examples of a row, without the padding behind them."""
    starts = np.flatnonzero(row.position_ids == 0)
    parts = [row.cut(at) for at in map(slice, starts, [*starts[1:], len(row.labels)])]
    while len(parts) > 1 and (parts[-1].labels == IGNORE).all():
        parts.pop()
    return parts


def _prompt(example: Row) -> int:
    """Return the tokens before an example's first label; 0 where that is no prompt, or nothing is a label."""
    labelled = np.flatnonzero(example.labels != IGNORE)
    first = int(labelled[0]) if len(labelled) else 0
    return first if first >= SHORTEST_PROMPT else 0


def _room(examples: list[Row], writing: Writing) -> int:
    """Return the tokens that a row has for its answers together; never less than those it has now."""
    kept = sum(_prompt(example) or len(example.labels) for example in examples)
    return max(writing.row_tokens, sum(len(example.labels) for example in examples)) - kept


def _lay(examples: list[Row], answers: list[np.ndarray | None], room: int) -> tuple[Row, int]:
    """Return one row of the examples with their answers, and how many tokens of answers are in it."""
    lengths = [len(answer) for answer in answers if answer is not None]
    longest = next((most for most in range(max(lengths, default=0), 0, -1) if sum(min(most, each) for each in lengths) <= room), 0)
    parts = [
        example if answer is None else _with_answer(example, answer[:longest]) for example, answer in zip(examples, answers, strict=True)
    ]
    return join_rows(parts), sum(min(longest, each) for each in lengths)


def _with_answer(example: Row, answer: np.ndarray) -> Row:
    prompt = _prompt(example)
    input_ids = np.concatenate([example.input_ids[:prompt], answer])
    sources = None if example.sources is None else np.full(len(input_ids), example.sources[0])
    return Row(input_ids, np.arange(len(input_ids)), np.concatenate([np.full(prompt, IGNORE), answer]), sources)


def _write(model: nn.Module, asked: list[tuple[Row, int]], writing: Writing, *, key: Sequence[int]) -> list[np.ndarray]:
    """Return an answer for each example, given with the room of its row."""
    prompts = [example.input_ids[: _prompt(example)] for example, _ in asked]
    limits = [
        min(writing.max_new_tokens, room, max(1, writing.row_tokens - len(prompt)))
        for prompt, (_, room) in zip(prompts, asked, strict=True)
    ]
    answers: dict[int, np.ndarray] = {}
    for group in _groups([len(prompt) for prompt in prompts], limits, most=writing.row_tokens):
        generators = [_generator(asked[place][0], key) for place in group]
        written = _generate(model, [prompts[place] for place in group], generators, limits[group[0]], writing)
        answers.update(zip(group, written, strict=True))
    return [answers[place] for place in range(len(asked))]


def _generator(example: Row, key: Sequence[int]) -> np.random.Generator:
    """Return a generator that follows from the key and the example alone."""
    content = hashlib.sha256(np.asarray(example.input_ids, np.int64).tobytes()).digest()[:8]
    return np.random.default_rng([*key, int.from_bytes(content)])


def _groups(lengths: list[int], limits: list[int], *, most: int) -> list[list[int]]:
    """Return the places of examples that are generated together: of one limit, and within `most` positions where there are several."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (limits[place], lengths[place])):
        wide = lengths[place] + limits[place]  # the longest of its group so far, which the others are padded to
        if groups and limits[groups[-1][0]] == limits[place] and wide * (len(groups[-1]) + 1) <= most:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


@torch.no_grad()
def _generate(
    model: nn.Module, prompts: list[np.ndarray], generators: list[np.random.Generator], limit: int, writing: Writing
) -> list[np.ndarray]:
    """Return up to `limit` new tokens of each prompt, with the token that ended them."""
    lm = causal_lm(model)
    device, width = next(lm.parameters()).device, max(map(len, prompts))
    own = lm.generation_config
    listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in (*listed, *writing.end_tokens) if end is not None})
    pad = ends[0] if ends else 0
    prompt_BP = torch.from_numpy(np.stack([np.pad(prompt, (width - len(prompt), 0), constant_values=pad) for prompt in prompts]))
    mask_BP = torch.from_numpy(np.stack([np.arange(width) >= width - len(prompt) for prompt in prompts])).long()
    draw = ExponentialRace(generators, writing.temperature, writing.num_tokens)
    # "greedy", as the processor leaves one token; and nothing of the model's own settings, which may weigh tokens anew
    lm.generation_config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, use_cache=True, eos_token_id=ends or None, pad_token_id=pad
    )
    try:
        whole_BT = lm.generate(
            input_ids=prompt_BP.long().to(device), attention_mask=mask_BP.to(device), logits_processor=LogitsProcessorList([draw])
        )
    finally:
        lm.generation_config = own
    return [_until_end(row, ends) for row in whole_BT[:, width:].cpu().numpy()]


def _until_end(tokens: np.ndarray, ends: list[int]) -> np.ndarray:
    found = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: found[0] + 1] if len(found) else tokens


class ExponentialRace(LogitsProcessor):
    """Leaves one token of each distribution: the first to arrive, where token i takes an exponential time of rate p_i.

    That is an exact draw. It takes nothing from any generator of torch, and rounding of the scores, in another batch
    or on another device, changes the winner only where two tokens arrive together; numbers laid off on a cumulative sum would
    cross one of its many borders far more often.

    Args:
        generators: one for each row.
        temperature: above 0.
        num_tokens: tokens that may be drawn; none is all.
    """

    def __init__(self, generators: Sequence[np.random.Generator], temperature: float, num_tokens: int | None):
        self._generators, self._temperature, self._num_tokens = generators, temperature, num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores_BV with all tokens but the drawn one at -inf."""
        log_rate_BV = scores[:, : self._num_tokens].float() / self._temperature
        times = np.stack([generator.standard_exponential(log_rate_BV.shape[1], np.float32) for generator in self._generators])
        time_BV = torch.from_numpy(times).to(scores.device).clamp_min_(torch.finfo(torch.float32).tiny)
        drawn_B1 = (log_rate_BV - time_BV.log_()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)
