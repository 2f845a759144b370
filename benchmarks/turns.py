"""Contestants as processes of their own that take turns; raw results as JSON lines; figures as ratios of one turn."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "trl", "liger-kernel", "torchtune", "triton")


def process_environment(threads: int) -> dict[str, str]:
    """Return the environment of a contestant: so many threads, no hub, this checkout first on the path."""
    count = str(threads)
    return {
        **os.environ,
        **{"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONPATH": str(ROOT)},
        **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    }


def run_process(module: str, settings: dict[str, Any], *, python: str) -> dict[str, Any]:
    """Run a contestant to its end and return the JSON object of its last line; end where it fails."""
    command = [python, "-m", module, "--settings", json.dumps(settings)]
    environment = process_environment(settings["threads"])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"{settings['system']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Contestant:
    """A process that stays and does one repetition each time it is asked, so that contestants can take turns.

    Args:
        module: started with --settings; answers each line on stdin, and its own start, with a JSON line.
        python: interpreter that has the contestant's libraries.
    """

    def __init__(self, module: str, settings: dict[str, Any], *, python: str):
        self.name = settings["system"]
        self._errors = tempfile.TemporaryFile("w+")
        command = [python, "-m", module, "--settings", json.dumps(settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, env=process_environment(settings["threads"]), cwd=ROOT, **pipes)

    def answer(self) -> dict[str, Any]:
        """Return the next line; end the benchmark where the process failed."""
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            sys.exit(f"{self.name} failed:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def ask(self) -> dict[str, Any]:
        """Have one repetition done and return its figures."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            pipe.close()


def add_result(file: Path, run: dict[str, Any]) -> None:
    """Append a run to the file of raw results."""
    with file.open("a") as lines:
        lines.write(json.dumps(run) + "\n")


def results(file: Path) -> list[dict[str, Any]]:
    """Return the runs of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def ratio(values: list[float], *, digits: int = 2) -> str:
    """Return the median with the smallest and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def memory(*fields: str) -> dict[str, int]:
    """Return fields of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024 for name in fields}


def forget_peak() -> None:
    """Let VmHWM begin again from what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter here and are installed."""
    installed = {distribution.name.replace("_", "-") for distribution in metadata.distributions() if distribution.name}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}
