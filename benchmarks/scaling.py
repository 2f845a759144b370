"""One worker against two on the same global batch, one thread each, gloo between processes of one machine.

python -m benchmarks.scaling [--repetitions 3]

Prints for each turn the speed of two workers over that of one, by wall time and by CPU time (all workers together), and the
share of a step in which a collective was under way.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.course_rows import write_course_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="the first is the warm-up and is not timed; the second is profiled")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of one step, over all workers")
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    from ray_jobs.core.models import resolve_model

    model = resolve_model("smollm2-135m-instruct")
    os.environ["OMP_NUM_THREADS"] = "1"
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        rows = write_course_rows(Path(folder), model, num_rows=options.rows * options.steps, length=options.length)
        for _ in range(options.repetitions):
            one, two = (measure(model, rows, options, world_size=world_size) for world_size in (1, 2))
            if abs(one["loss"] - two["loss"]) > 1e-3 * one["loss"]:
                sys.exit(f"not comparable: the losses of the first step are {one['loss']} and {two['loss']}")
            turn = {"wall": one["wall_s"] / two["wall_s"], "cpu": one["cpu_s"] / two["cpu_s"], "shares": two["shares"]}
            turns.append(turn)
            print(json.dumps({"load": os.getloadavg()[0], "one": one, "two": two}), file=sys.stderr, flush=True)
    for key, title in (("wall", "speed of two workers over one, wall time"), ("cpu", "tokens a CPU second of two over one")):
        print(f"{title}: {spread([turn[key] for turn in turns])}")
    print(f"communication under way, share of a step: {spread([turn['shares']['communication'] for turn in turns])}")


def measure(model: Path, rows: Path, options: argparse.Namespace, *, world_size: int) -> dict[str, Any]:
    """Train in `world_size` new processes, and return rank 0's figures with all ranks' CPU time of a step added up."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as out:
        torch.multiprocessing.spawn(work, (world_size, free_port(), model, rows, options.steps, options.rows, Path(out)), nprocs=world_size)
        found = [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(world_size)]
    return {**found[0], "cpu_s": sum(each["cpu_s"] for each in found)}


def work(rank: int, world_size: int, port: int, model: Path, rows: Path, steps: int, num_rows: int, out: Path) -> None:
    import torch
    import torch.distributed as dist

    from ray_jobs.training.adapters import add_lora
    from ray_jobs.training.batches import PackedRows
    from ray_jobs.training.loop import train
    from ray_jobs.training.losses import cross_entropy_loss
    from ray_jobs.training.models import load_model
    from ray_jobs.training.recipe import Recipe

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    adapted = add_lora(load_model(model, dtype=torch.bfloat16), rank=16, alpha=32, dropout=0.0, targets="all-linear")
    marks: list[tuple[float, float]] = []
    progress = train(
        adapted,
        cross_entropy_loss,
        PackedRows(rows),
        eval_rows=None,
        recipe=Recipe(max_steps=steps, global_batch_size=num_rows, micro_batch_size=1, dtype="bfloat16", checkpoint_every_steps=1),
        on_checkpoint=lambda step, save: marks.append((time.perf_counter(), time.process_time())),
    )
    (wall, cpu), (end_wall, end_cpu) = marks[0], marks[-1]
    lines = progress.log
    found = {"wall_s": (end_wall - wall) / (steps - 1), "cpu_s": (end_cpu - cpu) / (steps - 1)}
    (out / f"{rank}.json").write_text(json.dumps({**found, "loss": lines[0]["loss"], "shares": lines[-1]["shares"]}))
    if world_size > 1:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}, {len(values)} turns)"


if __name__ == "__main__":
    main()
