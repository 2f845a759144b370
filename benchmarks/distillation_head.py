"""Time and memory of the distillation head against TRL, Liger and torchtune, and against the matrix products it cannot avoid.

python -m benchmarks.distillation_head --trl-python /tmp/trlvenv/bin/python [--cells all-trained quarter-frozen jsd] [--out head.jsonl]
python -m benchmarks.distillation_head --trl-python ... --device cuda       (bfloat16, 8192 positions, 128256 tokens)

Each contestant is a process that stays and does one repetition when it is its turn, on tensors drawn by the same seed. A
comparison whose losses or gradient norms differ is refused. benchmarks/DISTILLATION.md has the results.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.turns import Contestant, add_result, ratio, results

MODULE = "benchmarks.distillation_head_systems"
OURS = ("raystill", "bare")
REFERENCE = "trl-dense"
CELLS: dict[str, dict[str, Any]] = {
    "all-trained": {"positions": 512, "valid_share": 1.0, "trained_head": True, "beta": 0.0},
    "quarter-frozen": {"positions": 1024, "valid_share": 0.25, "trained_head": False, "beta": 0.0},
    "jsd": {"positions": 512, "valid_share": 1.0, "trained_head": True, "beta": 0.5},
}
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32", "vocabulary": 49152, "student_width": 576, "teacher_width": 960, "calls": 1},
    "cuda": {"dtype": "bfloat16", "vocabulary": 128256, "student_width": 2048, "teacher_width": 4096, "calls": 10, "positions": 8192},
}
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}
"""Largest relative difference of loss and of gradient norm for which two heads count as doing the same work."""


class Goal(NamedTuple):
    """What raystill aims at in a cell: how many times the reference's time and memory its own are to be contained in."""

    time: float
    memory: float


GOALS = {"all-trained": Goal(1.0, 2.0), "quarter-frozen": Goal(4.0, 8.0)}


def main() -> None:
    options = arguments()
    for cell in options.cells if options.repetitions else ():
        run_cell(cell, options)
    found = results(options.out)
    refuse_other_work(found)
    print("\n\n".join([table(found), goals(found)]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default="/tmp/trlvenv/bin/python", help="interpreter that has TRL, Liger and torchtune")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--systems", nargs="+", help="default: all that the cell and the device allow")
    parser.add_argument("--repetitions", type=int, default=5, help="after one that is not timed; 0 only prints the table of --out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, kind in (("dtype", str), ("positions", int), ("vocabulary", int), ("student-width", int), ("teacher-width", int)):
        parser.add_argument(f"--{name}", type=kind, help="default: that of the device")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turn", default=f"{time.time():.0f}", help="runs of one turn are compared with each other")
    parser.add_argument(
        "--out", type=Path, default=Path("distillation_head.jsonl"), help="raw results, one JSON line a repetition; added to"
    )
    return parser.parse_args()


def settings_of(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a cell's settings on a device, with what the command line gives in place of the defaults."""
    settings = {**CELLS[cell], **SHAPES[options.device], "cell": cell, "device": options.device, "threads": options.threads}
    given = {name: getattr(options, name) for name in ("dtype", "positions", "vocabulary", "student_width", "teacher_width")}
    return settings | {name: value for name, value in given.items() if value is not None}


def systems_of(settings: dict[str, Any]) -> list[str]:
    """Return the contestants of a cell: those that have its divergence and run on its device."""
    names = ["raystill", REFERENCE, "trl-chunked"]
    names += ["trl-chunked-slice"] if settings["valid_share"] < 1 else []
    names += ["liger-chunked"] + (["liger-triton"] if settings["device"] == "cuda" else [])
    names += ["torchtune"] if settings["beta"] == 0 else []
    return [*names, "bare"]


def run_cell(cell: str, options: argparse.Namespace) -> None:
    """Start the contestants of a cell, let them take turns, and append each repetition to the file."""
    settings = settings_of(cell, options)
    contestants = []
    try:
        for name in options.systems or systems_of(settings):
            python = sys.executable if name in OURS else options.trl_python
            contestants.append(Contestant(MODULE, {**settings, "system": name}, python=python))
        starts = {one.name: one.answer() for one in contestants}
        for number, one in itertools.product(range(options.repetitions + 1), contestants):
            facts = {"turn": f"{options.turn}-{number}", "timed": number > 0, "system": one.name, "load": os.getloadavg()[0]}
            run = {**settings, **facts, **starts[one.name], **one.ask()}
            print(f"{cell} {one.name}: {run['cpu_s']:.2f} CPU s, {run['peak_bytes'] / 2**20:.0f} MiB", file=sys.stderr)
            add_result(options.out, run)
    finally:
        for one in contestants:
            one.stop()


def refuse_other_work(runs: list[dict[str, Any]]) -> None:
    """End where contestants of one cell have different losses or gradients; torchtune's loss leaves out the teacher's entropy."""
    for cell in cells(runs):
        mine = [run for run in runs if run["cell"] == cell and "loss" in run]
        for key, tolerance in zip(("loss", "grad_norm"), TOLERANCE[mine[0]["dtype"]], strict=True):
            seen = {run["system"]: run[key] for run in mine if not (key == "loss" and run["system"] == "torchtune")}
            if max(seen.values()) - min(seen.values()) > tolerance * max(seen.values()):
                sys.exit(f"not comparable: {key} of {cell} is {seen}")


def cells(runs: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["cell"] for run in runs))


def table(runs: list[dict[str, Any]]) -> str:
    """Return Markdown: time, memory and their ratios to raystill's within a turn, and how near each is to the matrix products."""
    lines = [
        "| cell | head | time, s | time / raystill | peak, MiB | peak / raystill | share of matrix rate | loss | gradient norm | turns |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells(runs):
        for system in dict.fromkeys(run["system"] for run in runs if run["cell"] == cell):
            turns = shared_turns(runs, cell, system, "raystill")
            theirs = [pair[0] for pair in turns]
            if not theirs:
                continue
            seconds = statistics.median(seconds_of(run) for run in theirs)
            peak = max(run["peak_bytes"] for run in theirs)
            values = [f"{theirs[0][key]:.6f}" if key in theirs[0] else "" for key in ("loss", "grad_norm")]
            figures = [
                f"{seconds:.3g}",
                ratio(time_ratios(turns)),
                f"{peak / 2**20:.0f}",
                ratio(memory_ratios(turns)),
                share(runs, theirs),
            ]
            lines.append(f"| {cell} | {system} | {' | '.join([*figures, *values])} | {len(theirs)} |")
    return "\n".join(lines)


def goals(runs: list[dict[str, Any]]) -> str:
    """Return a line for each aim: the reference's time and memory as multiples of raystill's, and whether that is enough."""
    lines = []
    for cell in (cell for cell in cells(runs) if cell in GOALS):
        turns = shared_turns(runs, cell, REFERENCE, "raystill")
        for what, values, goal in (("time", time_ratios(turns), GOALS[cell].time), ("memory", memory_ratios(turns), GOALS[cell].memory)):
            if values:
                met = "met" if statistics.median(values) >= goal else "missed"
                lines.append(f"- {cell}: {REFERENCE} needs {ratio(values)} times the {what}; aimed at: at least {goal:g}; {met}")
    return "\n".join(lines)


def shared_turns(runs: list[dict[str, Any]], cell: str, *systems: str) -> list[tuple[dict[str, Any], ...]]:
    """Return the timed runs of some systems in the turns that all of them finished."""
    timed = [run for run in runs if run["cell"] == cell and run["timed"]]
    by_turn = [{run["turn"]: run for run in timed if run["system"] == system} for system in systems]
    return [tuple(found[turn] for found in by_turn) for turn in by_turn[0] if all(turn in found for found in by_turn)]


def seconds_of(run: dict[str, Any]) -> float:
    """Return what a run cost: its CPU time, or on a GPU the time until the GPU was done."""
    return run["wall_s"] if run["device"] == "cuda" else run["cpu_s"]


def time_ratios(turns: list[tuple[dict[str, Any], ...]]) -> list[float]:
    return [seconds_of(one) / seconds_of(other) for one, other in turns]


def memory_ratios(turns: list[tuple[dict[str, Any], ...]]) -> list[float]:
    return [one["peak_bytes"] / max(other["peak_bytes"], 1) for one, other in turns]


def share(runs: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Return the unavoidable operations a second as a share of the fastest square matrix product's timed beside."""
    run = theirs[0]
    rates = [each["matrix_flops"] for each in runs if each["system"] == "bare" and each["device"] == run["device"]]
    if not rates:
        return ""
    widths = run["student_width"] * (3 if run["trained_head"] else 2) + run["teacher_width"]
    operations = 2 * round(run["positions"] * run["valid_share"]) * run["vocabulary"] * widths
    return f"{statistics.median(operations / seconds_of(one) for one in theirs) / max(rates):.0%}"


if __name__ == "__main__":
    main()
