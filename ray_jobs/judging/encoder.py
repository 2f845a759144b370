"""Sentence embeddings by a small encoder such as MiniLM: mean pooling over tokens, unit length.

Shape letters: N texts, D width.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 256
BATCH_SIZE = 32


class SentenceEncoder:
    """A transformers encoder in eval mode on the CPU; call it with texts.

    Args:
        folder: a Hugging Face folder with an encoder and its tokenizer.
        num_threads: torch threads of this process; None leaves them.
    """

    def __init__(self, folder: Path, *, num_threads: int | None = None):
        import torch
        from transformers import AutoModel, AutoTokenizer

        if num_threads:
            torch.set_num_threads(num_threads)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """Return the embeddings (N, D) of texts, each of length 1; texts beyond 256 tokens are cut.

        Source: Reimers and Gurevych 2019 (arXiv:1908.10084), section 3, mean pooling.
        """
        import torch

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found_ND = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH_SIZE):
                chosen = order[start : start + BATCH_SIZE]
                inputs = self._tokenizer(
                    [texts[i] for i in chosen], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
                )
                hidden_BTD = self._model(**inputs).last_hidden_state
                mask_BT1 = inputs["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
                mean_BD = (hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
                found_ND[chosen] = torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
        return found_ND
