"""How near the provider's limit each client comes, what wrong settings cost it, and whether several workers stay under one limit.

python -m benchmarks.judge [--tests utilisation wrong-settings workers] [--cells window-0.3 ...] [--turns 3] [--out judge.jsonl]

Every system answers the same prompts against the same stub on loopback, one after the other in a process of its own.
The stub must first serve ten times the limit on this machine. benchmarks/JUDGE.md has the results; judge_kill kills.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.judge_runs import middle, prove_fast_enough, run_contestant, running_stub
from benchmarks.judge_systems import calls_per_second
from benchmarks.turns import add_result, results

Row = dict[str, Any]
PER_MINUTE = 1200
BUCKET: Row = {"enforced": "bucket", "span_s": 6.0}
REQUESTS: Row = {"requests_per_minute": PER_MINUTE, "tokens_per_minute": 2_000_000}
FEWER: Row = {"requests_per_minute": 500, "tokens_per_minute": 2_000_000, **BUCKET}
TOKENS: Row = {"requests_per_minute": 10_000, "tokens_per_minute": 240_000, "latency": "tokens", **BUCKET}
CELLS: dict[str, Row] = {
    f"{name}-{latency_s:g}": {**limits, "latency_s": latency_s}
    for name, limits in (("window", REQUESTS), ("bucket", FEWER), ("tokens", TOKENS))
    for latency_s in (0.3, 3.0, 10.0)
}
"""Limits as providers keep them, in little: a bucket of 6 s in place of a minute's, and 30k tokens a minute made 8 times as fast."""
WRONG: dict[str, Row] = {
    "limit-halved": {**CELLS["window-0.3"], "change_after": 120, "change": {"requests_per_minute": PER_MINUTE / 2}},
    "latency-x10": {**CELLS["window-0.3"], "change_after": 120, "change": {"latency_s": 3.0}},
    "unknown-limit": {**CELLS["window-0.3"], "headers": False},
}
WRONG_CALLS = 400
TOKENS_PER_CALL = 347
"""Mean of the prompts' and the stub's completions, as a user would find out by a trial."""
OURS = "raystill"
WITHOUT_RAY = "raystill-here"
PLAIN = ("naive-16", "naive-64", "paced-1.00", "paced-0.97")
PEERS = ("ray-http", "ray-http-tuned", "inspect", "inspect-tuned", "curator-headers", "curator-told")
SYSTEMS = {
    "utilisation": (*PLAIN, *PEERS, WITHOUT_RAY, OURS),
    "wrong-settings": ("fixed-8", "naive-64", "paced-0.97", "inspect", "curator-headers", WITHOUT_RAY, OURS),
    "workers": ("paced-0.97", "paced-split", "ray-http-tuned", OURS),
}
CALLERS = (1, 2, 4)
BAR = "paced-0.97"
SETTLED_S = 2.0
SETTLED_SHARE = 0.9


def main() -> None:
    options = arguments()
    if options.turns:
        with running_stub() as stub:
            served = prove_fast_enough(stub, PER_MINUTE / 60)
            print(f"the stub serves {served:.0f} calls/s: {served / PER_MINUTE * 60:.0f} times the limit", file=sys.stderr)
            for turn in range(options.turns):
                for test in options.tests:
                    for case in cases(test, options):
                        run(stub, test, case, options, turn=f"{options.turn}-{turn}", served=served)
    found = results(options.out)
    tables = {"utilisation": utilisation_table, "wrong-settings": recovery_table, "workers": callers_table}
    print("\n\n".join(table([row for row in found if row["test"] == test]) for test, table in tables.items()))
    print("\n".join(goals([row for row in found if row["test"] == "utilisation"])))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inspect-python", default="/tmp/judgevenv-inspect/bin/python", help="interpreter that has inspect_ai")
    parser.add_argument("--curator-python", default="/tmp/judgevenv-curator/bin/python", help="interpreter that has bespokelabs-curator")
    parser.add_argument("--address", help="run what needs Ray in this cluster; default: each starts its own, whose cost is then counted")
    parser.add_argument("--tests", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--cells", nargs="+", default=[*CELLS, *WRONG], choices=[*CELLS, *WRONG])
    parser.add_argument("--systems", nargs="+", help="default: all of the test")
    parser.add_argument("--calls", type=int, default=200, help="prompts of a run; of wrong settings always 400")
    parser.add_argument("--turns", type=int, default=3, help="0 only prints the tables of --out")
    parser.add_argument(
        "--longest-s", type=float, help="a run is ended so long after its first call; default: thrice what it needs, 60 at least"
    )
    parser.add_argument("--turn", default=f"{time.time():.0f}", help="runs of one turn are compared with each other")
    parser.add_argument("--out", type=Path, default=Path("judge.jsonl"), help="raw results, one JSON line a run; added to")
    return parser.parse_args()


def cases(test: str, options: argparse.Namespace) -> list[Row]:
    """Return the runs of a test: a cell, a system, and how many callers."""
    cells = {"utilisation": CELLS, "wrong-settings": WRONG, "workers": {"window-0.3": CELLS["window-0.3"]}}[test]
    systems = [name for name in options.systems or SYSTEMS[test] if options.systems is None or name in SYSTEMS[test]]
    callers = CALLERS if test == "workers" else (None,)
    chosen = [cell for cell in cells if cell in options.cells]
    return [{"cell": cell, "system": system, "callers": number} for cell in chosen for system in systems for number in callers]


def run(stub: Any, test: str, case: Row, options: argparse.Namespace, *, turn: str, served: float) -> None:
    """Run one case and append it to the file."""
    cell = {**CELLS, **WRONG}[case["cell"]] | {"about": "Question "}
    told = {name: cell.get(name) for name in ("requests_per_minute", "tokens_per_minute", "latency_s")}
    n = WRONG_CALLS if test == "wrong-settings" else options.calls
    settings = {**{key: value for key, value in case.items() if value}, **told, "n": n, "tokens_per_call": TOKENS_PER_CALL}
    settings |= {"address": options.address} if options.address else {}
    pythons = {"inspect": options.inspect_python, "curator": options.curator_python}
    python = pythons.get(case["system"].split("-")[0], sys.executable)
    found = run_contestant(stub, cell, settings, python=python, longest_s=options.longest_s or longest_s(settings))
    found |= {"test": test, "turn": turn, "stub_serves": served}
    print(f"{test} {case}: {found['answered']} of {n}, {utilisation(found):.0%}, {found['refused']} refused", file=sys.stderr)
    if "failed" in found:
        print(found["failed"], file=sys.stderr)
    add_result(options.out, found)


def longest_s(settings: Row) -> float:
    """Return thrice the seconds that a run at the limit takes."""
    return max(60.0, 3 * (settings["n"] / calls_per_second(settings) + settings["latency_s"]))


def utilisation(run: Row) -> float:
    """Return what was let in as a share of what the limit allowed from the first call to the last reply."""
    stub, span_s = run["stub"], max(run["span_s"], 1e-9)
    seconds = span_s + (stub["span_s"] if stub.get("enforced") == "bucket" else 0)
    used = {"requests_per_minute": run["replied"], "tokens_per_minute": run["billed_tokens"]}
    return max(amount / (stub[limit] / 60 * seconds) for limit, amount in used.items() if stub.get(limit))


def steady(run: Row) -> float | None:
    """Return the share of the limit used from the first reply to the last call let in; None where no call was let in after it.

    It leaves out what a client waits for before it knows whether any call can succeed, and the last calls' latency.
    """
    stub, began = run["stub"], run["first_reply_at"] or 0.0
    later = [(at, tokens) for at, tokens in zip(run["let_in_at"], run["tokens"], strict=True) if at > began]
    if len(later) < 2:
        return None
    seconds = later[-1][0] - began
    used = {"requests_per_minute": len(later), "tokens_per_minute": sum(tokens for _, tokens in later)}
    return max(amount / (stub[limit] / 60 * seconds) for limit, amount in used.items() if stub.get(limit))


def grouped(runs: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in runs:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def utilisation_table(runs: list[Row]) -> str:
    """Return Markdown: each system's share of the limit, its losses and its price."""
    lines = [
        "| cell | calls | client | of the limit, % | from the first reply on, % | rows lost | 429s per 100 | paid twice | start-up, s | "
        "CPU s/1,000 | peak, MiB | load | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (cell, n, system), rows in grouped(runs, "cell", "n", "system").items():
        after = [100 * share for row in rows if (share := steady(row)) is not None]
        figures = [
            middle([100 * utilisation(row) for row in rows]),
            middle(after) if after else "-",
            lost(rows),
            middle([100 * row["refused"] / max(row["replied"], 1) for row in rows]),
            middle([row["paid_twice"] for row in rows]),
            middle([row["startup_s"] for row in rows]),
            middle([1000 * row["cpu_s"] / max(row["replied"], 1) for row in rows]),
            f"{max(row['peak_bytes'] for row in rows) / 2**20:.0f}",
            middle([row["load"] for row in rows]),
        ]
        lines.append(f"| {cell} | {n} | {system} | {' | '.join(figures)} | {len(rows)} |")
    return "\n".join(lines)


def lost(rows: list[Row]) -> str:
    """Return the rows without a reply; those of runs that were ended before their last row are marked."""
    text = middle([row["n"] - row["answered"] for row in rows])
    ended = sum(not row["finished"] for row in rows)
    return text + (f"; {ended} cut" if ended else "") + ("; aborted" if any("failed" in row for row in rows) else "")


def recovery_s(run: Row) -> float | None:
    """Return the seconds from the change (or the start) until two seconds that use 90% of the limit; None where none do."""
    stub = run["stub"]
    after = run["changed_at"] or 0.0
    now = {**stub, **stub.get("change", {})} if run["changed_at"] else stub
    enough = SETTLED_SHARE * now["requests_per_minute"] / 60 * SETTLED_S
    times = [at for at in run["let_in_at"] if at >= after]
    for first, at in enumerate(times):
        if sum(at <= other < at + SETTLED_S for other in times[first:]) >= enough:
            return at - after
    return None


def recovery_table(runs: list[Row]) -> str:
    """Return Markdown: how long each system needs to use 90% of the limit again."""
    lines = [
        "| change | client | back at 90% after, s | of the limit after it, % | rows lost | 429s per 100 | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for (cell, system), rows in grouped(runs, "cell", "system").items():
        times = [time_s for row in rows if (time_s := recovery_s(row)) is not None]
        back = (middle(times, 1) if times else "never") + (f"; {len(rows) - len(times)} never" if 0 < len(times) < len(rows) else "")
        refused = middle([100 * row["refused"] / max(row["replied"], 1) for row in rows])
        lines.append(
            f"| {cell} | {system} | {back} | {middle([100 * share_after(row) for row in rows])} | {lost(rows)} | {refused} | {len(rows)} |"
        )
    return "\n".join(lines)


def share_after(run: Row) -> float:
    """Return the share of the limit used from the change, or the start, to the last call let in."""
    after = run["changed_at"] or 0.0
    times = [at for at in run["let_in_at"] if at > after]
    limit = {**run["stub"], **(run["stub"].get("change", {}) if run["changed_at"] else {})}["requests_per_minute"] / 60
    return len(times) / (limit * max(times[-1] - after, 1e-9)) if times else 0.0


def callers_table(runs: list[Row]) -> str:
    """Return Markdown: what several callers ask for together under one limit."""
    lines = [
        "| client | callers | most asked in 1 s | most let in in 1 s | of the limit, % | rows lost | 429s per 100 | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (system, callers), rows in grouped(runs, "system", "callers").items():
        figures = [
            middle([row["most_asked_in_1s"] for row in rows]),
            middle([row["most_let_in_in_1s"] for row in rows]),
            middle([100 * utilisation(row) for row in rows]),
            lost(rows),
            middle([100 * row["refused"] / max(row["replied"], 1) for row in rows]),
        ]
        lines.append(f"| {system} | {callers} | {' | '.join(figures)} | {len(rows)} |")
    return "\n".join(lines)


def goals(runs: list[Row]) -> list[str]:
    """Return a line for each cell in which raystill ran: its share of the best paced loop's rate in the same turn."""
    lines = []
    for (cell, n, system), rows in grouped([row for row in runs if row["system"] in (OURS, WITHOUT_RAY)], "cell", "n", "system").items():
        bars = {row["turn"]: row for row in runs if (row["cell"], row["n"], row["system"]) == (cell, n, BAR)}
        pairs = [(row, bars[row["turn"]]) for row in rows if row["turn"] in bars]
        if pairs:
            shares = [100 * utilisation(ours) / utilisation(bar) for ours, bar in pairs]
            refused = [100 * ours["refused"] / max(ours["replied"], 1) for ours, _ in pairs]
            missing = max(ours["n"] - ours["answered"] for ours, _ in pairs)
            met = statistics.median(shares) >= 95 and statistics.median(refused) <= 5 and missing == 0
            lines.append(
                f"- {cell}, {n} calls, {system}: {middle(shares)}% of {BAR}, {middle(refused, 1)} 429s per 100, {missing} rows lost; "
                f"aimed at: at least 95%, at most 5, 0; {'met' if met else 'missed'}"
            )
    return lines


if __name__ == "__main__":
    main()
