"""Predicted against measured peak memory of real training, each row in a process of its own.

python -m benchmarks.memory [--method lora] [--dtype bfloat16] [--device cuda] [--llama2-7b]
python -m benchmarks.memory --distillation
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("full", "lora", "qlora")
LENGTHS = (256, 512)
BATCHES = (1, 4)
MIB = 2**20
CAP_BYTES = 16 * 10**9
"""What --llama2-7b may use of the GPU."""


class Row(NamedTuple):
    """One training run."""

    method: str
    length: int
    batch: int
    checkpointing: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    default_allocator: bool = False
    cap_bytes: int = 0
    targets: str = ""
    """worker or cache where the model's student of fewer layers is distilled from it; empty trains the model on the labels."""


class LateRows:
    """Random rows, short ones until the last micro-batch: the peak depends on the largest alone, so the others cost no time."""

    def __init__(self, length: int, num_short: int):
        self._length, self._short = length, num_short

    def __len__(self) -> int:
        return 1024

    def num_tokens(self, indices: list[int]) -> int:
        return len(indices) * self._length

    def drawn(self, index: int, *, epoch: int) -> Any:
        del epoch
        return self[index]

    def __getitem__(self, index: int) -> Any:
        import numpy as np

        from ray_jobs.training.batches import Row as PackedRow

        self._short -= 1
        length = self._length if self._short < 0 else 16
        ids = np.random.default_rng(index).integers(0, 1000, length)
        half = np.arange(length // 2)
        return PackedRow(ids, np.concatenate([half, half]), ids)


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the runs to measure."""
    if options.llama2_7b:
        return [Row("qlora", 1024, 1, True, "float16", "cuda", "meta-llama/Llama-2-7b-hf", cap_bytes=CAP_BYTES)]
    if options.distillation:
        taught = [("full", "worker"), ("full", "cache"), ("lora", "worker"), ("lora", "cache")]
        return [Row(method, 512, 1, targets=targets) for method, targets in taught]
    chosen = [options.method] if options.method else METHODS
    sizes = list(itertools.product(LENGTHS, BATCHES))
    plain = [Row(method, length, batch) for method in chosen for length, batch in sizes]
    recomputed = [Row(method, LENGTHS[-1], BATCHES[-1], True) for method in chosen]
    fixed = {"dtype": options.dtype, "device": options.device, "default_allocator": options.default_allocator}
    return [row._replace(**fixed) for row in plain + recomputed]


def predicted(row: Row) -> int:
    """Return what the plan says."""
    import torch

    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.memory_plan import Lora, Request, Work, predict

    work = Work(row.batch, row.length, getattr(torch, row.dtype), row.checkpointing, row.device)
    if row.targets:
        from benchmarks.memory_teaching import settings_of, teaching_of

        return predict(Request(settings_of(row.model), row.method, work, Lora(16), teaching=teaching_of(row.model, row.targets))).total
    return predict(Request(find_architecture(row.model).settings, row.method, work, Lora(16))).total


def measured(row: Row) -> dict[str, int]:
    """Train two steps of two micro-batches in this process, and return its peak and what it held before the model."""
    import ray.train.torch  # noqa: F401 - a worker has it
    import torch

    from ray_jobs.core.memory import peak_bytes, reset_peak
    from ray_jobs.training.allocator import return_freed_memory
    from ray_jobs.training.loop import train
    from ray_jobs.training.losses import cross_entropy_loss
    from ray_jobs.training.recipe import Recipe

    if row.cap_bytes:
        torch.cuda.set_per_process_memory_fraction(row.cap_bytes / torch.cuda.get_device_properties(0).total_memory)
    if not row.default_allocator:
        return_freed_memory()
    recipe = Recipe(
        max_steps=2,
        global_batch_size=2 * row.batch,
        micro_batch_size=row.batch,
        gradient_checkpointing=row.checkpointing,
        dtype=row.dtype,
    )
    rows, loss = LateRows(row.length, 0 if row.targets else 3 * row.batch), cross_entropy_loss
    with tempfile.TemporaryDirectory() as folder:
        model = build(row)
        if row.targets:
            from benchmarks.memory_teaching import build_loss

            loss = build_loss(row.model, row.targets, rows, recipe, Path(folder))
        reset_peak()
        process = peak_bytes()
        train(model, loss, rows, eval_rows=None, recipe=recipe)
    if row.device == "cpu":
        return {"peak": peak_bytes(), "loaded": process}
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return {"peak": torch.cuda.max_memory_reserved() + context, "loaded": context, "allocated": torch.cuda.max_memory_allocated()}


def build(row: Row) -> Any:
    """Return the model on its device, as `raystill finetune` builds it; a known architecture without weights gets random ones."""
    import torch

    from ray_jobs.core.models import BUILT_IN, resolve_model
    from ray_jobs.training.adapters import add_lora
    from ray_jobs.training.models import Quantization, load_model

    if row.targets:
        from benchmarks.memory_teaching import build_student

        return build_student(row.model, method=row.method, dtype=row.dtype)
    quantization = Quantization() if row.method == "qlora" else None
    dtype = torch.float32 if row.method == "full" else getattr(torch, row.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = resolve_model(row.model) if row.model in BUILT_IN else random_model(row.model, temporary)
        model = load_model(folder, dtype=dtype, quantization=quantization, device=row.device)
    if row.method == "full":
        return model.requires_grad_(True)
    return add_lora(model, rank=16, alpha=32, dropout=0.0, targets="all-linear")


def random_model(name: str, folder: str) -> str:
    """Write random 16-bit weights of a known architecture, and return the folder."""
    import torch

    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.skeletons import skeleton_of

    model = skeleton_of(find_architecture(name).settings, dtype=torch.float16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def run_apart(row: Row) -> dict[str, int]:
    """Return what a fresh process measures."""
    command = [sys.executable, "-m", "benchmarks.memory", "--row", json.dumps(row)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--default-allocator", action="store_true", help="leave glibc's threshold as it is")
    parser.add_argument("--llama2-7b", action="store_true", help="QLoRA of its shape with random weights under a 16 GB cap; needs a GPU")
    parser.add_argument("--distillation", action="store_true", help="a student of 20 layers, its teacher in the worker or its targets kept")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measured(Row(*json.loads(options.row)))))
        return
    print(
        "| method | targets | length | batch | checkpointing | loaded MiB | predicted MiB | measured MiB | error |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows(options):
        found, expected = run_apart(row), predicted(row)
        figures = f"{found['loaded'] / MIB:.0f} | {expected / MIB:.0f} | {found['peak'] / MIB:.0f} | {expected / found['peak'] - 1:+.1%}"
        print(
            f"| {row.method} | {row.targets or '-'} | {row.length} | {row.batch} | {'yes' if row.checkpointing else 'no'} | {figures} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
