"""The same models, rows and adapters for every contestant of the step benchmark; needs no part of raystill."""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.turns import memory, versions

HEAD_WIDTH = 64
RANK, ALPHA = 16, 32


def main() -> None:
    """Write the models and rows of the settings where they are missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    for name in ("student", "teacher"):
        write_model(Path(settings[name]), shape=settings[f"{name}_shape"], vocabulary=settings["vocabulary"], length=settings["length"])
    write_rows(Path(settings["rows"]), settings)
    print(json.dumps({}))


def write_model(folder: Path, *, shape: str, vocabulary: int, length: int) -> None:
    """Write a Llama of random weights: 576x30 and 960x32 are SmolLM2's 135M and 360M.

    Args:
        shape: width x layers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return
    width, layers = map(int, shape.split("x"))
    heads = width // HEAD_WIDTH
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 3, 1),
        max_position_embeddings=max(length, 2048),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(folder: Path, settings: dict[str, Any]) -> None:
    """Write rows of one example each; the last `valid_share` of its tokens have labels, the first token never."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    length, generator = settings["length"], torch.Generator().manual_seed(0)
    prompt = max(length - round(length * settings["valid_share"]), 1)
    rows = []
    for _ in range(settings["micro_batch_size"] * settings["steps"]):
        ids = torch.randint(settings["vocabulary"], (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "segment_lengths": [length]})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-0.parquet")


def same_adapters(model: nn.Module) -> None:
    """Draw the adapters' first factors anew, each from its own name's seed, whatever was drawn before."""
    for place, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_A" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)) / parameter.shape[1] ** 0.5)


class Marks:
    """Wall and process time at the end of each step; the first step is the warm-up."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def __call__(self, *_: Any) -> None:
        """Take the time; on a GPU once it has done what it was given."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._marks.append((time.process_time(), time.perf_counter()))

    def result(self) -> dict[str, Any]:
        """Return the seconds of each step after the first, the peak memory in bytes and the versions."""
        cpu, wall = ([after - before for before, after in itertools.pairwise(times)] for times in zip(*self._marks, strict=True))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else memory("VmHWM")["VmHWM"]
        return {"cpu_s": cpu, "wall_s": wall, "peak_bytes": peak, "versions": versions()}


if __name__ == "__main__":
    main()
