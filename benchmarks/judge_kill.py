"""What is paid for twice when a run is killed and the same command is given again: python -m benchmarks.judge_kill

kill -9 of the driver, or of the worker that holds the calls, once the stub has billed 25, 50 and 75% of 200 calls. The bill
is the stub's. Systems on Ray join a cluster that outlives them. benchmarks/JUDGE.md has the results.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.judge import TOKENS_PER_CALL
from benchmarks.judge_runs import ROOT, Stub, Tree, middle, prove_fast_enough, running_stub, start, told_lines
from benchmarks.turns import add_result, process_environment, results

Row = dict[str, Any]
STUB: Row = {"requests_per_minute": 1200, "tokens_per_minute": 2_000_000, "latency_s": 1.0, "about": "Question "}
SHARES = (0.25, 0.5, 0.75)
ON_RAY = ("raystill", "ray-http-checkpoint")
SYSTEMS = ("raystill", "ray-http-checkpoint", "inspect-cache", "curator-told")
LOOK_S = 0.02
ORPHANS_S = 5.0


def main() -> None:
    options = arguments()
    if options.turns:
        given = contextlib.nullcontext(options.address) if options.address else cluster()
        with running_stub() as stub, given as address:
            served = prove_fast_enough(stub, STUB["requests_per_minute"] / 60)
            for turn in range(options.turns):
                for system in options.systems:
                    for victim in options.victims if system in ON_RAY else ["driver"]:
                        for share in options.shares:
                            kill_once(stub, address, options, {"system": system, "victim": victim, "share": share}, turn, served)
    print(table(results(options.out)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inspect-python", default="/tmp/judgevenv-inspect/bin/python", help="interpreter that has inspect_ai")
    parser.add_argument("--curator-python", default="/tmp/judgevenv-curator/bin/python", help="interpreter that has bespokelabs-curator")
    parser.add_argument("--address", help="of a running Ray cluster; default: one is started")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--victims", nargs="+", default=["driver", "worker"], choices=["driver", "worker"])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of the calls, billed before the kill")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--longest-s", type=float, default=240.0, help="a run is ended after so long")
    parser.add_argument("--turns", type=int, default=1, help="0 only prints the table of --out")
    parser.add_argument("--out", type=Path, default=Path("judge_kill.jsonl"), help="raw results, one JSON line a kill; added to")
    return parser.parse_args()


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Yield the address of a Ray cluster that does not end with a driver."""
    command = [sys.executable, "-m", "benchmarks.judge_ray"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=process_environment(1), text=True, **pipes)
    tree = Tree(process.pid)
    try:
        line = process.stdout.readline()
        if not line:
            sys.exit("the Ray cluster did not start: see above")
        yield json.loads(line)["address"]
    finally:
        tree.kill()
        process.wait()


def kill_once(stub: Stub, address: str, options: argparse.Namespace, case: Row, turn: int, served: float) -> None:
    """Run, kill, give the command again where the driver died, and append what the stub billed."""
    pythons = {"inspect": options.inspect_python, "curator": options.curator_python}
    python = pythons.get(case["system"].split("-")[0], sys.executable)
    told = {name: STUB[name] for name in ("requests_per_minute", "tokens_per_minute", "latency_s")}
    stub.begin(STUB)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        settings = {**case, **told, "n": options.calls, "tokens_per_call": TOKENS_PER_CALL, "url": stub.url, "folder": folder}
        settings |= {"address": address} if case["system"] in ON_RAY else {}
        process = start(settings, python=python, errors=errors)
        if not wait_for_bill(stub, process, case["share"] * options.calls, options.longest_s):
            process.kill()
            errors.seek(0)
            sys.exit(
                f"{case} cannot be killed in mid-run: {stub.stats()['billed']} calls were billed and no more came\n{errors.read()[-2000:]}"
            )
        found = strike(stub, process, case["victim"])
        if case["victim"] == "driver":
            process.wait()
            process = start(settings, python=python, errors=errors)
        lines = finish(process, options.longest_s)
        errors.seek(0)
        told = json.loads(lines[-1]) if lines else {"answered": 0, "failed": errors.read()[-600:]}
    run = {**settings, **{key: value for key, value in stub.stats().items() if key not in ("let_in_at", "tokens")}, **found, **told}
    run |= {"turn": turn, "stub_serves": served, "load": os.getloadavg()[0]}
    summary = {key: run[key] for key in ("answered", "billed", "paid_twice", "in_flight_at_kill", "billed_by_orphans")}
    print(case, summary, run.get("failed", ""), file=sys.stderr)
    add_result(options.out, run)


def wait_for_bill(stub: Stub, process: subprocess.Popen, calls: float, longest_s: float) -> bool:
    """Return whether so many calls were billed in time, by a process that still runs."""
    end = time.monotonic() + longest_s
    while stub.stats()["billed"] < calls and process.poll() is None and time.monotonic() < end:
        time.sleep(LOOK_S)
    return process.poll() is None and stub.stats()["billed"] >= calls


def strike(stub: Stub, process: subprocess.Popen, victim: str) -> Row:
    """Kill; return the calls in flight around it, and what was billed in the seconds after a driver died."""
    before = stub.stats()
    pid = process.pid if victim == "driver" else caller_of(stub)
    os.kill(pid, signal.SIGKILL)
    after = stub.stats()
    in_flight = max(before["in_flight"], after["in_flight"]) + after["billed"] - before["billed"]
    if victim != "driver":
        return {"in_flight_at_kill": in_flight, "billed_by_orphans": None}
    time.sleep(ORPHANS_S)
    return {"in_flight_at_kill": in_flight, "billed_by_orphans": stub.stats()["billed"] - after["billed"]}


def caller_of(stub: Stub) -> int:
    """Return the process with the most connections to the stub."""
    held: dict[int, int] = {}
    for connection in psutil.net_connections("tcp"):
        if connection.raddr and connection.raddr.port == stub.port and connection.pid and connection.pid != os.getpid():
            held[connection.pid] = held.get(connection.pid, 0) + 1
    return max(held, key=held.__getitem__)


def finish(process: subprocess.Popen, longest_s: float) -> list[str]:
    """Return the lines that a contestant prints; none where it had to be ended or failed."""
    try:
        lines = told_lines(process.communicate(timeout=longest_s)[0])
    except subprocess.TimeoutExpired:
        Tree(process.pid).kill()
        process.communicate()
        return []
    return [] if process.returncode else lines


def table(runs: list[Row]) -> str:
    """Return Markdown: for each system and victim, what three kills cost."""
    lines = [
        "| client | killed | after | billed | paid twice | in flight at the kill | billed by orphans | rows lost | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for run in runs:
        cases.setdefault((run["system"], run["victim"], run["share"]), []).append(run)
    for (system, victim, share), rows in cases.items():
        keys = ("billed", "paid_twice", "in_flight_at_kill", "billed_by_orphans")
        figures = [middle(values) if None not in (values := [row[key] for row in rows]) else "-" for key in keys]
        lost = middle([row["n"] - row["answered"] for row in rows]) + ("; failed" if any("failed" in row for row in rows) else "")
        lines.append(f"| {system} | {victim} | {share:.0%} | {' | '.join(figures)} | {lost} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
