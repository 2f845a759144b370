"""Speed and peak memory of whole off-policy distillation steps against TRL's GKDTrainer and against the passes they cannot avoid.

python -m benchmarks.distillation_step --trl-python /tmp/trlvenv/bin/python [--cells full-all lora-quarter] [--out step.jsonl]
python -m benchmarks.distillation_step --trl-python ... --device cuda        (bfloat16, 8192 tokens, 128256 entries)

Every run is a process of its own on the same random weights and rows; the contestants take turns. A comparison whose losses or
gradient norms at the first step differ is refused. benchmarks/DISTILLATION.md has the results.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.turns import add_result, ratio, results, run_process

CELLS: dict[str, dict[str, Any]] = {
    "full-all": {"method": "full", "valid_share": 1.0},
    "full-quarter": {"method": "full", "valid_share": 0.25},
    "lora-all": {"method": "lora", "valid_share": 1.0},
    "lora-quarter": {"method": "lora", "valid_share": 0.25},
}
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32", "length": 512, "vocabulary": 49152, "student_shape": "576x30", "teacher_shape": "960x32"},
    "cuda": {"dtype": "bfloat16", "length": 8192, "vocabulary": 128256, "student_shape": "2048x16", "teacher_shape": "3072x28"},
}
CHECKPOINTING = "raystill-epoch2-checkpointing"
"""Not among the defaults: the smallest that a step can be, against trl-checkpointing. The system whose name ends in -tight
returns freed memory at once, as a worker does whose plan comes near its limit; it holds less and takes longer."""
SYSTEMS = ("raystill-epoch1", "raystill-epoch2", "raystill-epoch2-tight", "trl", "trl-checkpointing", "bare-epoch1", "bare-epoch2")
REFERENCE = "trl"
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}
"""Largest relative difference of the first step's loss and gradient norm for which two systems count as doing the same work."""


class Goal(NamedTuple):
    """Aims of one of raystill's systems beside the reference: at least so many times its speed, at most that share of its memory."""

    speed: float
    memory: float | None


GOALS = {"raystill-epoch1": Goal(1.15, None), "raystill-epoch2": Goal(1.5, 0.6), "raystill-epoch2-tight": Goal(1.5, 0.6)}


def main() -> None:
    options = arguments()
    if options.repetitions:
        run_all(options)
    found = results(options.out)
    refuse_other_work(found)
    print("\n\n".join([table(found), goals(found)]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default="/tmp/trlvenv/bin/python")
    parser.add_argument("--cells", nargs="+", default=["full-all", "lora-quarter"], choices=list(CELLS))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=[*SYSTEMS, CHECKPOINTING])
    parser.add_argument("--repetitions", type=int, default=1, help="turns of each contestant; 0 only prints the table of --out")
    parser.add_argument("--steps", type=int, default=3, help="the first is the warm-up and is not timed")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, kind in (("dtype", str), ("length", int), ("vocabulary", int), ("student-shape", str), ("teacher-shape", str)):
        parser.add_argument(f"--{name}", type=kind, help="default: that of the device; a shape is WIDTHxLAYERS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turn", default=f"{time.time():.0f}", help="runs of one turn are compared with each other")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "distillation_step", help="models and rows (2 GB)")
    parser.add_argument("--out", type=Path, default=Path("distillation_step.jsonl"), help="raw results, one JSON line a run; added to")
    return parser.parse_args()


def settings_of(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a cell's settings on a device, with what the command line gives in place of the defaults."""
    from ray_jobs.core.models import resolve_model
    from ray_jobs.training.batches import step_rows

    given = {name: getattr(options, name) for name in ("dtype", "length", "vocabulary", "student_shape", "teacher_shape")}
    settings = {**CELLS[cell], **SHAPES[options.device], **{name: value for name, value in given.items() if value is not None}}
    for name in ("steps", "micro_batch_size", "learning_rate", "device", "threads"):
        settings[name] = getattr(options, name)
    num_rows = options.micro_batch_size * options.steps
    drawn = [step_rows(num_rows, step=step, seed=0, global_batch_size=options.micro_batch_size) for step in range(options.steps)]
    folders = {name: str(options.work / f"{settings[f'{name}_shape']}-{settings['vocabulary']}") for name in ("student", "teacher")}
    rows = options.work / f"rows-{settings['length']}-{settings['valid_share']}-{num_rows}-{settings['vocabulary']}"
    tokenizer = str(resolve_model("smollm2-135m-instruct"))
    return {**settings, **folders, "cell": cell, "rows": str(rows), "order": list(itertools.chain(*drawn)), "tokenizer": tokenizer}


def run_all(options: argparse.Namespace) -> None:
    """Let the contestants take turns, and append each run to the file."""
    for cell in options.cells:
        settings = settings_of(cell, options)
        run_process("benchmarks.distillation_inputs", {**settings, "system": "inputs"}, python=sys.executable)
        for repetition, system in itertools.product(range(options.repetitions), options.systems):
            theirs = system.startswith("trl")
            module = "benchmarks.distillation_step_trl" if theirs else "benchmarks.distillation_step_ours"
            turn = f"{options.turn}-{repetition}"
            facts = {
                **settings,
                "system": system,
                "turn": turn,
                "load": os.getloadavg()[0],
                "cache": str(options.work / "cache" / cell / turn),
            }
            run = {**facts, **run_process(module, facts, python=options.trl_python if theirs else sys.executable)}
            print(f"{cell} {system}: {statistics.median(run['cpu_s']):.1f} CPU s a step, load {run['load']:.0f}", file=sys.stderr)
            add_result(options.out, run)


def refuse_other_work(runs: list[dict[str, Any]]) -> None:
    """End where contestants of one cell have different losses or gradient norms at the first step."""
    for cell in cells(runs):
        mine = [run for run in runs if run["cell"] == cell and "losses" in run]
        for key, tolerance in zip(("losses", "grad_norms"), TOLERANCE[mine[0]["dtype"]], strict=True):
            seen = {run["system"]: run[key][0] for run in mine}
            if max(seen.values()) - min(seen.values()) > tolerance * max(seen.values()):
                sys.exit(f"not comparable: the first of {key} of {cell} is {seen}")


def cells(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["cell"] for run in runs))


def table(runs: list[dict[str, Any]]) -> str:
    """Return Markdown: each system's time a step and memory, and its speed and memory beside the reference's in the same turn."""
    lines = [
        "| cell | system | time a step, s | tokens/s | speed / trl | peak, MiB | peak / trl | first loss | gradient norm | steps, load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells(runs):
        for system in dict.fromkeys(run["system"] for run in runs if run["cell"] == cell):
            mine = [run for run in runs if (run["cell"], run["system"]) == (cell, system)]
            times = [second for run in mine for second in seconds_of(run)]
            median, run = statistics.median(times), mine[0]
            tokens = run["micro_batch_size"] * run["length"] / median
            pairs = shared_turns(runs, cell, system)
            firsts = [f"{run[key][0]:.6f}" if key in run else "" for key in ("losses", "grad_norms")]
            load = f"{len(times)}, {min(run['load'] for run in mine):.1f} to {max(run['load'] for run in mine):.1f}"
            figures = [f"{median:.2f} ({min(times):.2f} to {max(times):.2f})", f"{tokens:.0f}", shown(speeds(pairs))]
            figures += [f"{max(run['peak_bytes'] for run in mine) / 2**20:.0f}", shown(memories(pairs)), *firsts, load]
            lines.append(f"| {cell} | {system} | {' | '.join(figures)} |")
    return "\n".join(lines)


def goals(runs: list[dict[str, Any]]) -> str:
    """Return a line for each aim, with what was found and whether it is enough."""
    lines = []
    for cell, (system, goal) in itertools.product(cells(runs), GOALS.items()):
        pairs = shared_turns(runs, cell, system)
        if not pairs:
            continue
        speed, memory = statistics.median(speeds(pairs)), statistics.median(memories(pairs))
        lines.append(f"- {cell}, {system}: {speed:.2f} times TRL's speed; aimed at: at least {goal.speed}; {met(speed >= goal.speed)}")
        if goal.memory is not None:
            lines.append(f"- {cell}, {system}: {memory:.2f} of TRL's memory; aimed at: at most {goal.memory}; {met(memory <= goal.memory)}")
    return "\n".join(lines)


def met(reached: bool) -> str:
    return "met" if reached else "missed"


def shown(values: list[float]) -> str:
    return ratio(values) if values else ""


def shared_turns(runs: list[dict[str, Any]], cell: str, system: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the runs of a system beside the reference's of the same turn."""
    theirs, mine = ({run["turn"]: run for run in runs if (run["cell"], run["system"]) == (cell, name)} for name in (REFERENCE, system))
    return [(mine[turn], theirs[turn]) for turn in mine if turn in theirs]


def seconds_of(run: dict[str, Any]) -> list[float]:
    """Return the cost of each timed step: CPU time, or on a GPU the time until it was done."""
    return run["wall_s"] if run["device"] == "cuda" else run["cpu_s"]


def speeds(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    return [statistics.median(seconds_of(theirs)) / statistics.median(seconds_of(mine)) for mine, theirs in pairs]


def memories(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    return [mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in pairs]


if __name__ == "__main__":
    main()
