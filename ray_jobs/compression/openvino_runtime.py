"""An exported OpenVINO folder, run by OpenVINO GenAI (answers) and by the OpenVINO runtime itself (logits).

Shapes: T positions, V vocabulary.
"""

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from ray_jobs.compression.runtimes import Generation

WEIGHTS = "openvino_model.xml"
FLOAT32: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""Set outright: by default a CPU with AMX computes in bfloat16, and every CPU keeps the key-value cache in 8 bits."""


class OpenVINORuntime:
    """A stateful OpenVINO language model on the CPU, computing in float32, cache included, whatever type its weights are stored in.

    Args:
        folder: what openvino_export wrote.
        num_threads: CPU threads of one request.
    """

    def __init__(self, folder: Path, *, num_threads: int):
        self._folder = folder
        self._properties = {**FLOAT32, "INFERENCE_NUM_THREADS": num_threads}
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **self._properties)

    def generate(self, prompt_ids: list[int], num_new_tokens: int) -> Generation:
        """See Runtime."""
        config = openvino_genai.GenerationConfig(max_new_tokens=num_new_tokens, ignore_eos=True, do_sample=False, apply_chat_template=False)
        clock = _FirstTokenClock()
        result = self._pipeline.generate(openvino.Tensor(np.array([prompt_ids], dtype=np.int64)), config, clock)
        return Generation(list(result.tokens[0]), clock.first_token_s, time.perf_counter() - clock.start)

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """See Runtime."""
        return self._session.restart(input_ids)

    @cached_property
    def _session(self) -> "LogitsSession":
        return LogitsSession(self._folder / WEIGHTS, properties=self._properties)


class LogitsSession:
    """Feeds a stateful OpenVINO model chunk by chunk; its key-value cache lives in the model.

    Args:
        model: path of the .xml file, or a model in memory.
        properties: device properties of the compilation.
    """

    def __init__(self, model: Path | openvino.Model, *, properties: dict[str, Any]):
        self._request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
        self._num_seen = 0

    def restart(self, input_ids: list[int]) -> np.ndarray:
        """Forget what was fed, feed a text and return its logits, float32 [T, V]."""
        self._request.reset_state()
        self._num_seen = 0
        return self.feed(input_ids)

    def feed(self, input_ids: list[int]) -> np.ndarray:
        """Feed the next tokens of the text and return their logits, float32 [T, V]."""
        start, self._num_seen = self._num_seen, self._num_seen + len(input_ids)
        outputs = self._request.infer(
            {
                "input_ids": np.array([input_ids], dtype=np.int64),
                "attention_mask": np.ones((1, self._num_seen), dtype=np.int64),
                "position_ids": np.arange(start, self._num_seen, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        return outputs["logits"][0].copy()


def probe(model: openvino.Model, input_ids: list[int]) -> np.ndarray:
    """Return the logits [T, V] of a model in memory, fed as generation feeds it: a start, a chunk, then token by token."""
    session = LogitsSession(model, properties=FLOAT32)
    chunk = max(1, len(input_ids) // 3)
    logits = [session.restart(input_ids[:chunk]), session.feed(input_ids[chunk : 2 * chunk])]
    return np.concatenate([*logits, *(session.feed([token]) for token in input_ids[2 * chunk :])])


class _FirstTokenClock(openvino_genai.StreamerBase):
    """Notes when the pipeline hands over its first new token."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.perf_counter()
        self.first_token_s = 0.0

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        self.first_token_s = self.first_token_s or time.perf_counter() - self.start
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass
