"""An exported ONNX folder, run by ONNX Runtime GenAI.

Shapes: T positions, V vocabulary.
"""

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai

from ray_jobs.compression.runtimes import Generation


class ONNXRuntime:
    """An ONNX language model on the CPU.

    Args:
        folder: what onnx_export wrote.
        num_threads: CPU threads of one request.
    """

    def __init__(self, folder: Path, *, num_threads: int):
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": num_threads}}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompt_ids: list[int], num_new_tokens: int) -> Generation:
        """See Runtime."""
        start = time.perf_counter()
        generator = self._feed(prompt_ids, num_tokens=len(prompt_ids) + num_new_tokens)
        generator.generate_next_token()
        first_token_s = time.perf_counter() - start
        while not generator.is_done():
            generator.generate_next_token()
        tokens = generator.get_sequence(0)[len(prompt_ids) :].tolist()
        return Generation(tokens, first_token_s, time.perf_counter() - start)

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """See Runtime."""
        return self._feed(input_ids, num_tokens=len(input_ids) + 1).get_output("logits")[0].astype(np.float32)

    def _feed(self, input_ids: list[int], *, num_tokens: int) -> onnxruntime_genai.Generator:
        options = onnxruntime_genai.GeneratorParams(self._model)
        options.set_search_options(min_length=num_tokens, max_length=num_tokens, do_sample=False)  # lengths with the prompt
        generator = onnxruntime_genai.Generator(self._model, options)
        generator.append_tokens(np.array([input_ids], dtype=np.int32))
        return generator
