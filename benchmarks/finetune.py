"""Speed and peak memory of LoRA and NF4 LoRA against TRL's SFTTrainer and against the bare forward and backward pass.

python -m benchmarks.finetune --trl-python /tmp/trlvenv/bin/python [--methods lora nf4] [--repetitions 3] [--out results.json]

Every run is a process of its own on the same packed rows; the contestants take turns. A comparison whose losses at the first
step differ is refused. benchmarks/FINETUNE.md has the results.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.course_rows import write_course_rows
from benchmarks.turns import add_result, ratio, results, run_process

SAME_LOSS = 1e-3
"""Largest relative difference of the first step's losses for which two systems count as doing the same work."""


def main() -> None:
    options = arguments()
    if options.repetitions:
        run_all(options)
    found = results(options.out)
    refuse_other_work(found)
    print(table(found))


def run_all(options: argparse.Namespace) -> None:
    """Let the contestants take turns, and append each run to the file."""
    from ray_jobs.core.models import resolve_model
    from ray_jobs.training.batches import step_rows

    model, batch = resolve_model("smollm2-135m-instruct"), options.micro_batch_size * options.accumulation
    with tempfile.TemporaryDirectory() as folder:
        num_rows = batch * options.steps
        rows = write_course_rows(Path(folder), model, num_rows=num_rows, length=options.length)
        order = [place for step in range(options.steps) for place in step_rows(num_rows, step=step, seed=0, global_batch_size=batch)]
        shared = {
            **{name: getattr(options, name) for name in ("length", "micro_batch_size", "accumulation", "steps", "threads")},
            **{"rank": 16, "alpha": 32, "learning_rate": 2e-4, "model": str(model), "rows": str(rows), "order": order},
        }
        for repetition, method, checkpointing in itertools.product(range(options.repetitions), options.methods, options.checkpointing):
            for system in options.systems:
                settings = {**shared, "system": system, "method": method, "checkpointing": checkpointing}
                run = {"turn": f"{options.turn}-{repetition}", "load": os.getloadavg()[0], **settings, **measure(settings, options)}
                print(f"{system} {method} {checkpointing}: {run['cpu_s']:.1f} CPU s a step, load {run['load']:.0f}", file=sys.stderr)
                add_result(options.out, run)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default="/tmp/trlvenv/bin/python")
    parser.add_argument("--systems", nargs="+", default=["raystill", "trl", "bare"], choices=["raystill", "trl", "bare"])
    parser.add_argument("--methods", nargs="+", default=["lora", "nf4"], choices=["lora", "nf4"])
    parser.add_argument("--checkpointing", nargs="+", type=lambda text: text == "on", default=[False, True], metavar="on|off")
    parser.add_argument("--repetitions", type=int, default=3, help="0 only prints the table of --out")
    parser.add_argument("--steps", type=int, default=4, help="the first is the warm-up and is not timed")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turn", default=f"{time.time():.0f}", help="runs of one turn are compared with each other")
    parser.add_argument("--out", type=Path, default=Path("finetune.jsonl"), help="raw results, one JSON line a run; added to")
    return parser.parse_args()


def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in a process of its own and return what it printed."""
    if settings["system"] == "trl":
        return run_process("benchmarks.finetune_trl", settings, python=options.trl_python)
    return run_process("benchmarks.finetune_ours", settings, python=sys.executable)


def refuse_other_work(runs: list[dict[str, Any]]) -> None:
    """End where contestants of one cell have different losses at the first step: they did not do the same work."""
    for cell in cells(runs):
        first = [run["losses"][0] for run in runs if cell_of(run) == cell]
        if max(first) - min(first) > SAME_LOSS * max(first):
            sys.exit(f"not comparable: the losses of the first step of {cell} are {first}")


def cell_of(run: dict[str, Any]) -> tuple[str, bool]:
    return run["method"], run["checkpointing"]


def cells(runs: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    return list(dict.fromkeys(cell_of(run) for run in runs))


def table(runs: list[dict[str, Any]]) -> str:
    """Return Markdown: each system's speed and memory as a ratio to raystill's, median and range over repetitions."""
    lines = [
        "| method | checkpointing | system | CPU time a token | wall time a token | peak memory | first loss | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells(runs):
        for system in dict.fromkeys(run["system"] for run in runs if cell_of(run) == cell):
            ours, theirs = (by_turn(runs, cell, name) for name in ("raystill", system))
            turns = sorted(ours.keys() & theirs.keys())
            if not turns:
                continue
            figures = [ratio([theirs[turn][key] / ours[turn][key] for turn in turns]) for key in ("cpu_s", "wall_s", "peak_bytes")]
            loss = statistics.median(run["losses"][0] for run in theirs.values())
            lines.append(f"| {cell[0]} | {'on' if cell[1] else 'off'} | {system} | {' | '.join(figures)} | {loss:.5f} | {len(turns)} |")
    return "\n".join(lines)


def by_turn(runs: list[dict[str, Any]], cell: tuple[str, bool], system: str) -> dict[str, dict[str, Any]]:
    return {run["turn"]: run for run in runs if cell_of(run) == cell and run["system"] == system}


if __name__ == "__main__":
    main()
