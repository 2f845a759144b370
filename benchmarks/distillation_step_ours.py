"""One measured process of raystill's distillation on the training loop, or of the passes it cannot avoid; prints one JSON line."""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.distillation_inputs import ALPHA, RANK, Marks, same_adapters
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.allocator import return_freed_memory
from ray_jobs.training.batches import PackedRows, step_batches
from ray_jobs.training.losses import valid_hidden
from ray_jobs.training.models import choose_dtype, load_model
from ray_jobs.training.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    torch.set_num_threads(settings["threads"])
    if settings["system"].endswith("-tight"):
        return_freed_memory()
    student = load_model(settings["student"], dtype=torch.float32, device=settings["device"])
    if settings["method"] == "lora":
        student = add_lora(student, rank=RANK, alpha=ALPHA, dropout=0.0, targets="all-linear")
        same_adapters(student)
    recipe = Recipe(
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        schedule="constant",
        warmup_share=0.0,
        global_batch_size=settings["micro_batch_size"],
        micro_batch_size=settings["micro_batch_size"],
        gradient_checkpointing=settings["system"].endswith("-checkpointing"),
        dtype=settings["dtype"],
        checkpoint_every_steps=10**6,
    )
    marks, run = Marks(), bare if settings["system"].startswith("bare") else distil
    found = run(student, settings, PackedRows(settings["rows"]), recipe, marks)
    print(json.dumps({**marks.result(), **found}))


def load_teacher(settings: dict[str, Any]) -> Any:
    """Return the frozen teacher in the type of the products."""
    dtype = choose_dtype(settings["dtype"], settings["device"])
    return load_model(settings["teacher"], dtype=dtype, device=settings["device"]).requires_grad_(False)


def distil(student: Any, settings: dict[str, Any], rows: PackedRows, recipe: Recipe, marks: Marks) -> dict[str, Any]:
    """Run the project's own loop and loss, forward KL at temperature 1: epoch 1 fills the cache of targets, epoch 2 reads it."""
    from ray_jobs.distillation.divergence import Divergence
    from ray_jobs.distillation.loss import DistillLoss
    from ray_jobs.training.loop import train

    targets = cached_targets(settings, epoch_rows=len(rows))
    loss = DistillLoss(targets, divergence=Divergence("forward_kl"))
    progress = train(student, loss, rows, eval_rows=None, recipe=recipe, on_log=marks)
    targets.flush()
    found = {**targets.counts(), "shares": progress.log[-1]["shares"]}
    if settings["system"].startswith("raystill-epoch2") and found["targets_computed"]:
        sys.exit(f"{found['targets_computed']} targets were missing in {settings['cache']}: run raystill-epoch1 in the same turn first")
    return {**found, "losses": [line["loss"] for line in progress.log], "grad_norms": [line["grad_norm"] for line in progress.log]}


def cached_targets(settings: dict[str, Any], *, epoch_rows: int) -> Any:
    """Return the cache around a teacher that is loaded when a target is missing; it keeps hidden states in the type of the products."""
    from ray_jobs.core.storage import Storage
    from ray_jobs.distillation.cache import CachedTargets, KeptHidden
    from ray_jobs.distillation.head import read_head
    from ray_jobs.distillation.shards import ShardStore
    from ray_jobs.distillation.targets import LazyTeacher

    folder, load = Path(settings["teacher"]), functools.partial(load_teacher, settings)
    dtype = choose_dtype(settings["dtype"], settings["device"])
    head = functools.partial(read_head, folder, None, dtype=dtype, device=settings["device"], load=load)
    kept = KeptHidden(width=int(settings["teacher_shape"].partition("x")[0]), dtype=dtype)
    store = ShardStore(Storage(settings["cache"]), kind=f"hidden-{settings['dtype']}", budget_bytes=2**40)
    return CachedTargets(LazyTeacher(load, head), store, identity=str(folder), kept=kept, epoch_rows=epoch_rows)


def bare(student: Any, settings: dict[str, Any], rows: PackedRows, recipe: Recipe, marks: Marks) -> dict[str, Any]:
    """Run the student's body forward and backward, and in epoch 1 the teacher's forward: no head, loss, optimizer or loop."""
    teacher = load_teacher(settings) if settings["system"] == "bare-epoch1" else None
    sizes = {"global_batch_size": recipe.global_batch_size, "micro_batch_size": recipe.micro_batch_size}
    dtype = choose_dtype(settings["dtype"], settings["device"])
    student.train()
    for step in range(recipe.max_steps or 1):
        for batch in step_batches(rows, step=step, seed=recipe.seed, **sizes):
            on_device = batch.to(settings["device"])
            with torch.autocast(settings["device"], dtype, enabled=dtype is not torch.float32):
                if teacher is not None:
                    with torch.no_grad():
                        valid_hidden(teacher, on_device)
                hidden_NH, _ = valid_hidden(student, on_device)
            hidden_NH.backward(torch.ones_like(hidden_NH))
        student.zero_grad(set_to_none=True)
        marks()
    return {}


if __name__ == "__main__":
    main()
