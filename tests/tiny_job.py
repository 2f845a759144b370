"""A tiny training job that needs no stage before it, for faults; also a driver: `python tiny_job.py STAGE ROWS MODEL MIN MAX`."""

import sys
from pathlib import Path

import torch
from packed_rows import write_rows

from ray_jobs.core.cluster import connect
from ray_jobs.core.storage import Storage
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.loop import train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model
from ray_jobs.training.ray_train import TrainingJob, Workers, fit
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13), (10,), (6, 10), (15,)]
RECIPE = Recipe(max_steps=60, learning_rate=1e-3, global_batch_size=4, dtype="float32", checkpoint_every_steps=3)
STEP_CALLS = 2
"""Calls of the loss in a step of one worker."""


def tiny_job(stage, rows, model, *, recipe=RECIPE, at_step=0, disturb=None):
    """Return a job that trains the last layer of a model; `disturb()` is called on each worker in its step `at_step`.

    Workers cannot import the tests, so what they run is made in here: a nested function travels by value.
    """

    def build(device):
        import torch

        from ray_jobs.training.losses import cross_entropy_loss
        from ray_jobs.training.models import load_model

        model_ = load_model(model, dtype=torch.float32, device=device)
        for name, parameter in model_.named_parameters():
            parameter.requires_grad_("layers.3" in name)
        calls = []

        def loss(*arguments):
            calls.append(None)
            if disturb and len(calls) == at_step * 2:
                disturb()
            return cross_entropy_loss(*arguments)

        return model_, loss

    def export(model_, folder):
        from safetensors.torch import save_file

        save_file({name: p.detach().clone() for name, p in model_.named_parameters() if p.requires_grad}, folder / "trained.safetensors")

    return TrainingJob(
        build=build, export=export, export_name="model", storage=Storage(str(stage)), rows=Storage(str(rows)), evaluate=False, recipe=recipe
    )


def undisturbed(rows, model, *, recipe=RECIPE):
    """Return the losses of the same job in this process, alone and without Ray."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model_ = load_model(model, dtype=torch.float32)
    for name, parameter in model_.named_parameters():
        parameter.requires_grad_("layers.3" in name)
    progress = train(model_, cross_entropy_loss, PackedRows(Path(rows) / "train"), eval_rows=None, recipe=recipe)
    torch.set_num_threads(threads)
    return [line["loss"] for line in progress.log if "loss" in line]


def losses(stage):
    """Return the losses that a job logged."""
    return [line["loss"] for line in Storage(str(stage)).read_jsonl("metrics.jsonl") if "loss" in line]


def make_rows(folder):
    """Write rows to train on below a folder, and return the folder."""
    write_rows(Path(folder) / "train", SEGMENTS)
    return folder


def main():
    stage, rows, model, fewest, most = sys.argv[1:]
    workers = Workers(min_workers=int(fewest), max_workers=int(most), memory_bytes=2**30)
    with connect():
        fit(tiny_job(stage, rows, model), workers=workers, max_failures=3, keep_checkpoints=2, label="tiny")


if __name__ == "__main__":
    main()
