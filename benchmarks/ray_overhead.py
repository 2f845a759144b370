"""From the command to the first step: `raystill finetune` against the same loop in plain Python, and what takes the time.

python -m benchmarks.ray_overhead [--repetitions 3]

Both run one optimizer step of LoRA on the same packed rows. The parts of the Ray run are told apart by when its processes
appear (looked up ten times a second) and by the time stamps of metrics.jsonl.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.course_rows import write_course_rows

ROOT = Path(__file__).parents[1]
CONFIG = """
[run]
name = "overhead"
storage = "{storage}"
trackers = []
[data]
pairs = ["{pairs}"]
max_length = 512
eval_share = 0
[finetune]
max_steps = 1
learning_rate = 2e-4
global_batch_size = 1
micro_batch_size = 1
dtype = "bfloat16"
[workers]
cpus = 1
memory = "6GiB"
"""
PARTS = ("the driver's imports and checks", "Ray's start", "the controller's start", "the worker's imports and model load", "first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        runs = [{"ray": with_ray(Path(folder), turn), "plain": plain(Path(folder))} for turn in range(options.repetitions)]
    for run in runs:
        print(json.dumps({"load": os.getloadavg()[0], **run}), file=sys.stderr)
    print(f"command to first step, raystill over plain Python: {spread([total(run['ray']) / total(run['plain']) for run in runs])}")
    for part in PARTS:
        print(f"  {part}: {spread([run['ray'][part] / total(run['ray']) for run in runs])} of raystill's")
    for part in runs[0]["plain"]:
        print(f"  {part}: {spread([run['plain'][part] / total(run['plain']) for run in runs])} of plain Python's")


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def with_ray(folder: Path, turn: int) -> dict[str, float]:
    """Return the seconds of each part of a `raystill finetune`; its data is prepared outside of the time."""
    storage = folder / f"runs-{turn}"
    file = folder / "run.toml"
    file.write_text(CONFIG.format(storage=storage, pairs=ROOT / "ray_jobs/datasets/os_course/pairs.jsonl"))
    command = [sys.executable, "-m", "ray_jobs"]
    subprocess.run([*command, "prepare", str(file)], check=True, stderr=subprocess.DEVNULL)
    appeared: dict[str, float] = {}
    began = time.time()
    with subprocess.Popen([*command, "finetune", str(file)], stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            note_processes(driver.pid, appeared)
            time.sleep(0.1)
    if driver.returncode:
        sys.exit(f"raystill finetune ended with {driver.returncode}")
    (line,) = [json.loads(row) for row in (storage / "overhead/finetune/metrics.jsonl").read_text().splitlines()]
    step_s = line["tokens"] / line["tokens_per_s"]
    shutil.rmtree(storage)
    ends = [appeared["ray"], appeared["controller"], appeared["worker"], line["wall_time"] - step_s, line["wall_time"]]
    return {part: end - start for part, start, end in zip(PARTS, [began, *ends], ends, strict=False)}


def note_processes(driver: int, appeared: dict[str, float]) -> None:
    """Remember when the processes of a run are first seen: Ray's own, the controller and a worker."""
    import psutil

    for process in psutil.Process(driver).children(recursive=True):
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for name, sign in (("ray", "gcs_server"), ("controller", "ray::TrainController"), ("worker", "ray::RayTrainWorker")):
            if sign in words:
                appeared.setdefault(name, time.time())


def plain(folder: Path) -> dict[str, float]:
    """Return the seconds of each part of the same step in plain Python."""
    from ray_jobs.core.models import resolve_model

    model = resolve_model("smollm2-135m-instruct")
    rows = write_course_rows(folder / "plain", model, num_rows=1, length=512)
    settings = {"system": "raystill", "method": "lora", "checkpointing": False, "rank": 16, "alpha": 32, "learning_rate": 2e-4}
    sizes = {"steps": 1, "micro_batch_size": 1, "accumulation": 1, "threads": 1, "model": str(model), "rows": str(rows)}
    began = time.time()
    command = [sys.executable, str(ROOT / "benchmarks/finetune_ours.py"), "--settings", json.dumps({**settings, **sizes})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    imported = found["started_at"] + found["imported_s"]
    loaded = imported + found["loaded_s"]
    return {"imports": imported - began, "model load": loaded - imported, "first step": found["first_step_at"] - loaded}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
