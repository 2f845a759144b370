"""A Hugging Face folder to a folder for ONNX Runtime GenAI, by that package's own model builder."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from ray_jobs.core.errors import ModelError


def export_onnx(model_folder: Path, target: Path, *, precision: Literal["fp32", "int8"]) -> None:
    """Write `target` with model.onnx, genai_config.json and the tokenizer.

    Args:
        model_folder: plain causal language model with its tokenizer.
        target: folder to write, created where missing.
        precision: int8 stores the linear layers in 8 bits, in blocks of 32 with a scale each; the embedding stays float32.

    Raises:
        ModelError: the builder does not know this architecture or failed.
    """
    with tempfile.TemporaryDirectory() as cache:
        # A process of its own: the builder prints progress, and gives its memory back by ending.
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model_folder), "-o", str(target)]
        done = subprocess.run(
            [*command, "-p", precision, "-e", "cpu", "-c", cache], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    if done.returncode or not (target / "model.onnx").is_file():
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise ModelError(
            f"ONNX Runtime's model builder cannot export {model_folder} as {precision}: {last.strip()}; "
            "take the onnx variants out of compress.variants"
        )
