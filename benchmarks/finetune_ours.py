"""One measured process of raystill's training loop, or of the bare forward and backward pass; prints one JSON line."""

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    import torch

    torch.set_num_threads(settings["threads"])
    from ray_jobs.training.adapters import add_lora
    from ray_jobs.training.batches import PackedRows
    from ray_jobs.training.models import Quantization, load_model
    from ray_jobs.training.recipe import Recipe

    imported = time.time()
    torch.manual_seed(0)
    quantization = Quantization() if settings["method"] == "nf4" else None
    model = add_lora(
        load_model(settings["model"], dtype=torch.bfloat16, quantization=quantization),
        rank=settings["rank"],
        alpha=settings["alpha"],
        dropout=0.0,
        targets="all-linear",
    )
    loaded, before = time.time(), memory()
    recipe = Recipe(
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        schedule="constant",
        warmup_share=0.0,
        global_batch_size=settings["micro_batch_size"] * settings["accumulation"],
        micro_batch_size=settings["micro_batch_size"],
        gradient_checkpointing=settings["checkpointing"],
        dtype="bfloat16",
        checkpoint_every_steps=10**6,
    )
    marks = Marks()
    losses = {"raystill": loop, "bare": bare}[settings["system"]](model, PackedRows(settings["rows"]), recipe, marks)
    print(json.dumps({**marks.result(), "losses": losses, "imported_s": imported - STARTED, "loaded_s": loaded - imported, **before}))


class Marks:
    """Wall and process time at the end of each step."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float, float]] = []

    def __call__(self, *_: Any) -> None:
        self._marks.append((time.perf_counter(), time.process_time(), time.time()))

    def result(self) -> dict[str, Any]:
        (wall, cpu, _), (end_wall, end_cpu, _) = self._marks[0], self._marks[-1]
        steps = len(self._marks) - 1
        return {
            "wall_s": (end_wall - wall) / max(steps, 1),
            "cpu_s": (end_cpu - cpu) / max(steps, 1),
            "first_step_at": self._marks[0][2],
            "started_at": STARTED,
            "peak_bytes": memory("VmHWM")["VmHWM"],
        }


def memory(*fields: str) -> dict[str, int]:
    """Return fields of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024 for name in fields or ("VmRSS",)}


def loop(model: Any, rows: Any, recipe: Any, marks: Marks) -> list[float]:
    from ray_jobs.training.loop import train
    from ray_jobs.training.losses import cross_entropy_loss

    progress = train(model, cross_entropy_loss, rows, eval_rows=None, recipe=recipe, on_log=marks)
    sys.stderr.write(json.dumps(progress.log[-1]["shares"]) + "\n")
    return [line["loss"] for line in progress.log]


def bare(model: Any, rows: Any, recipe: Any, marks: Marks) -> list[float]:
    """Run the model's own forward with labels and the backward pass on the same batches: no optimizer, no loop."""
    import torch

    from ray_jobs.training.batches import step_batches

    sizes = {"global_batch_size": recipe.global_batch_size, "micro_batch_size": recipe.micro_batch_size}
    steps = [step_batches(rows, step=step, seed=recipe.seed, **sizes) for step in range(recipe.max_steps)]
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    losses = []
    for batches in steps:
        valid, total = sum(batch.num_valid for batch in batches), 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(
                    input_ids=batch.input_ids_BT,
                    position_ids=batch.position_ids_BT,
                    labels=batch.labels_BT,
                    num_items_in_batch=valid,
                    use_cache=False,  # with a cache transformers lets packed examples see each other
                )
            output.loss.backward()
            total += float(output.loss)
        model.zero_grad(set_to_none=True)
        assert math.isfinite(total)
        losses.append(total)
        marks()
    return losses


if __name__ == "__main__":
    main()
