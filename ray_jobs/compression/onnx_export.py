"""A Hugging Face folder to a folder for ONNX Runtime GenAI, by that package's own model builder."""

import subprocess
import sys
import tempfile
from pathlib import Path

from ray_jobs.core.errors import ModelError

_BUILDER_NAMES = {"float32": "fp32", "int8": "int8"}


def export_onnx(model_folder: Path, target: Path, *, precision: str) -> None:
    """Write `target` with model.onnx, genai_config.json and the tokenizer.

    Args:
        model_folder: plain causal language model with its tokenizer.
        target: folder to write, created where missing.
        precision: float32, or int8, which stores the linear layers in 8 bits, a scale for each 32 weights, and the embedding in float32.

    Raises:
        ModelError: the builder does not know this architecture or failed.
    """
    with tempfile.TemporaryDirectory() as cache:
        # A process of its own: the builder prints progress, and gives its memory back by ending.
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model_folder), "-o", str(target)]
        done = subprocess.run(
            [*command, "-p", _BUILDER_NAMES[precision], "-e", "cpu", "-c", cache],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    if done.returncode or not (target / "model.onnx").is_file():
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise ModelError(
            f"ONNX Runtime's model builder cannot export {model_folder} as {precision}: {last.strip()}; "
            "take the onnx variants out of compress.variants"
        )
