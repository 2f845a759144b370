"""What the bench asks of an engine, and the transformers engine; the others are in openvino_runtime.py and onnx_runtime.py.

Shapes: T positions, V vocabulary.
"""

import time
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer


class Generation(NamedTuple):
    """One greedy answer of a fixed length, timed."""

    token_ids: list[int]
    """The new tokens, without the prompt."""
    first_token_s: float
    """Wall time from the request to the first new token."""
    total_s: float
    """Wall time from the request to the last new token."""


class Runtime(Protocol):
    """A loaded model in some engine."""

    def generate(self, prompt_ids: list[int], num_new_tokens: int) -> Generation:
        """Return exactly `num_new_tokens` greedy tokens; the end-of-text token does not stop it."""

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """Return the next-token logits of every position, float32 [T, V], of a text that starts afresh."""


class TorchRuntime:
    """A transformers model run by torch.

    Args:
        model: causal language model in eval mode, on its device.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def generate(self, prompt_ids: list[int], num_new_tokens: int) -> Generation:
        """See Runtime."""
        prompt = torch.tensor([prompt_ids], device=self._model.device)
        clock = _FirstTokenClock()
        with torch.inference_mode():
            tokens = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=num_new_tokens,
                max_new_tokens=num_new_tokens,
                streamer=clock,
            )[0].tolist()
        return Generation(tokens[len(prompt_ids) :], clock.first_token_s, time.perf_counter() - clock.start)

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """See Runtime."""
        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([input_ids], device=self._model.device)).logits[0].float().cpu().numpy()


class _FirstTokenClock(BaseStreamer):
    """Notes when `generate` hands over its first new token; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first_token_s = 0.0
        self._num_puts = 0

    def put(self, value: Any) -> None:
        self._num_puts += 1
        if self._num_puts == 2:
            self.first_token_s = time.perf_counter() - self.start

    def end(self) -> None:
        pass
