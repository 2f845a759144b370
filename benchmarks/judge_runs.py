"""The stub as a process, proof that it is fast enough, and a contestant's run beside it with what both say of it."""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.judge_systems import prompts, request
from benchmarks.turns import process_environment

ROOT = Path(__file__).parents[1]
LOOK_S = 0.1
PROOF_S = 3.0
PROOF_TRIES = 3
PROOF_AT_ONCE = 32
TIMES_FASTER = 10
LONGEST_START_S = 180.0
Row = dict[str, Any]


class Stub:
    """The judge stub's process.

    Args:
        url: of the endpoint, as clients take it.
    """

    def __init__(self, port: int):
        self.port = port
        self.url = f"http://127.0.0.1:{port}/v1"

    def begin(self, settings: Row) -> None:
        """Forget all counts and go on with these settings."""
        self._open("/settings", json.dumps(settings).encode())

    def stats(self) -> Row:
        """Return the counts since `begin`."""
        return self._open("/stats")

    def _open(self, path: str, data: bytes | None = None) -> Row:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data, timeout=30) as reply:
            return json.load(reply)


@contextlib.contextmanager
def running_stub() -> Iterator[Stub]:
    """Yield a stub on a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        stub = Stub(found.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.judge_stub", "--port", str(stub.port)]
    process = subprocess.Popen(command, cwd=ROOT, env=process_environment(1))
    try:
        while True:
            with contextlib.suppress(OSError):
                stub.stats()
                break
            if process.poll() is not None:
                sys.exit(f"the stub ended with {process.returncode}")
            time.sleep(LOOK_S)
        yield stub
    finally:
        process.kill()
        process.wait()


def prove_fast_enough(stub: Stub, limit_per_s: float, *, seconds: float = PROOF_S) -> float:
    """Return the calls a second that the stub serves without a limit; end where no try has ten times what is tested."""
    served = 0.0
    for _ in range(PROOF_TRIES):
        if served < TIMES_FASTER * limit_per_s:
            stub.begin({"latency_s": 0.0})
            asyncio.run(_hammer(stub, seconds))
            served = stub.stats()["served_per_s"]
    if served < TIMES_FASTER * limit_per_s:
        sys.exit(
            f"the stub serves {served:.0f} calls/s on this machine now, less than {TIMES_FASTER} times the {limit_per_s:g}/s tested: "
            "figures would be the stub's; run on a quieter machine or lower the limit"
        )
    return served


async def _hammer(stub: Stub, seconds: float) -> None:
    import aiohttp

    end, bodies = time.monotonic() + seconds, [request(prompt) for prompt in prompts(PROOF_AT_ONCE)]

    async def ask(body: Row) -> None:
        while time.monotonic() < end:
            async with session.post(f"{stub.url}/chat/completions", json=body) as reply:
                await reply.read()

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(ask(body) for body in bodies))


class Tree:
    """CPU time and memory of a process and all that it started, looked up now and then."""

    def __init__(self, pid: int):
        self._root = psutil.Process(pid)
        self._cpu_s: dict[int, float] = {}
        self.peak_bytes = 0

    def look(self) -> None:
        """Add what is in use now."""
        resident = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self._root, *self._root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._cpu_s[process.pid] = times.user + times.system
                    resident += process.memory_info().rss - process.memory_info().shared
        self.peak_bytes = max(self.peak_bytes, resident)

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_s.values())

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self._root.children(recursive=True), self._root]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def start(settings: Row, *, python: str, errors: Any) -> subprocess.Popen:
    """Start a contestant."""
    command = [python, "-m", "benchmarks.judge_systems", "--settings", json.dumps(settings)]
    return subprocess.Popen(command, cwd=ROOT, env=process_environment(1), stdout=subprocess.PIPE, stderr=errors, text=True)


def run_contestant(stub: Stub, stub_settings: Row, settings: Row, *, python: str, longest_s: float) -> Row:
    """Return what the stub, the operating system and the contestant say of one run, ended after `longest_s` of calls."""
    stub.begin(stub_settings)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        began, first_call = time.monotonic(), None
        process = start({**settings, "url": stub.url, "folder": folder}, python=python, errors=errors)
        tree, finished = Tree(process.pid), True
        while process.poll() is None:
            tree.look()
            time.sleep(LOOK_S)
            if first_call is None and stub.stats()["asked"]:
                first_call = time.monotonic()
            if time.monotonic() > (began + LONGEST_START_S if first_call is None else first_call + longest_s):
                finished = False
                break
        found = stub.stats()
        tree.kill()
        lines = told_lines(process.stdout.read())
        process.wait()
        errors.seek(0)
        if finished and process.returncode:
            found["failed"] = errors.read()[-600:]
    told = json.loads(lines[-1]) if lines and finished and not process.returncode else {"answered": found["replied"]}
    facts = {"finished": finished, "startup_s": (first_call or began) - began, "cpu_s": tree.cpu_s, "peak_bytes": tree.peak_bytes}
    return {**settings, "stub": stub_settings, **found, **told, **facts, "load": os.getloadavg()[0]}


def told_lines(output: str) -> list[str]:
    """Return the lines that are JSON objects: libraries print of their own accord."""
    return [line for line in output.splitlines() if line.startswith("{")]


def middle(values: list[float], digits: int = 0) -> str:
    """Return the median, with the smallest and the largest where there are several."""
    text = f"{statistics.median(values):.{digits}f}"
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else text
