"""The whole chain on a tiny model, undisturbed and with its driver killed in every stage."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ray_jobs.__main__ import main
from ray_jobs.core.config_file import to_toml
from ray_jobs.core.run_folder import FOLDERS
from ray_jobs.pipeline import STAGES

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
WAIT_S = 300


def write_toml(config, folder: Path, name: str) -> Path:
    """Write a config as TOML with another run name."""
    path = folder / f"{name}.toml"
    path.write_text(to_toml(config.model_copy(update={"run": config.run.model_copy(update={"name": name})})))
    return path


def start(toml: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ray_jobs", "run", str(toml), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def kill_in_stage(toml: Path, run: Path, stage: str, delay_s: float) -> bool:
    """Start the chain, kill its driver `delay_s` after it said that it begins the stage and opened the stage's folder.

    Returns:
        Whether the kill fell within the stage: False where it was finished by then.
    """
    process = start(toml)
    folder = run / FOLDERS.get(stage, stage)
    begins = f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage} ..."
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        for line in process.stderr:
            lines.append(line.strip())
            if lines[-1] == begins:
                begun.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + WAIT_S
    while not (begun.is_set() and (folder / "started.json").exists()):
        assert process.poll() is None, lines
        assert time.monotonic() < deadline, f"{stage} did not begin: {lines}"
        time.sleep(0.02)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reader.join(WAIT_S)
    process.stdout.close()
    return not (folder / "manifest.json").exists()


def results(run: Path) -> dict:
    """What must not depend on being killed: everything but times and ids of attempts."""
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import load_file

    tables = {}
    for path in sorted(run.glob("answers/*.parquet")) + sorted(run.glob("judge/*.parquet")):
        rows = pq.read_table(path).to_pylist()
        tables[path.name] = sorted(json.dumps({k: v for k, v in row.items() if k != "latency_s"}, default=str) for row in rows)
    weights = load_file(run / "finetune/adapter/adapter_model.safetensors") | load_file(run / "distill/student/model.safetensors")
    return {"tables": tables, "weights": {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in weights.items()}}


def test_killed_in_every_stage_gives_the_undisturbed_result(ray_cluster, tiny_config, tmp_path):
    config = tiny_config(compress__variants=["torch-int8"], compress__num_questions=1, compress__repetitions=1)
    plain = start(write_toml(config, tmp_path, "plain"))
    killed_toml = write_toml(config, tmp_path, "killed")
    output, errors = plain.communicate(timeout=600)
    assert plain.returncode == 0, errors
    summary = json.loads(output)
    assert set(summary["stage_seconds"]) == set(STAGES)

    killed = Path(config.run.storage) / "killed"
    draw = random.Random(20261121)
    landed = []
    for stage in STAGES:
        before = manifest_ids(killed)
        if stage in before:  # the kill before came too late: this stage is finished
            continue
        if kill_in_stage(killed_toml, killed, stage, draw.uniform(0.1, 2.0)):
            landed.append(stage)
        assert before.items() <= manifest_ids(killed).items(), "a finished stage was run again"
    assert len(landed) >= 4, f"the driver was killed within {landed} only"
    before = manifest_ids(killed)
    last = start(killed_toml)
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors
    assert before.items() <= manifest_ids(killed).items(), "a finished stage was run again"
    assert results(killed) == results(Path(config.run.storage) / "plain")


def manifest_ids(run: Path) -> dict:
    """The ids of the finished stages' manifests, by stage."""
    stage_of = {folder: stage for stage, folder in FOLDERS.items()}
    return {stage_of.get(path.parent.name, path.parent.name): json.loads(path.read_text())["id"] for path in run.glob("*/manifest.json")}


def test_more_than_any_node_has_is_refused_at_once(ray_cluster, tiny_config, tmp_path, capfd):
    for field, value in (("cpus", 1000), ("gpus", 8), ("memory", "900TiB"), ("num_workers", 99)):
        toml = write_toml(tiny_config(**{f"workers__{field}": value}), tmp_path, f"too-{field}")
        assert main(["run", str(toml)]) == 2
        errors = capfd.readouterr().err
        assert errors.count("\n") == 1 and "node 1" in errors
        assert not (tmp_path / "runs" / f"too-{field}").exists()
