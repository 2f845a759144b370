"""A real sweep of the tiny model: killed after its first trial, called again, finished; one point cannot work."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ray_jobs import tune
from ray_jobs.core.config_file import load_config, to_toml
from ray_jobs.core.errors import ConfigChanged, StageMissing
from ray_jobs.core.run_folder import RunFolder

pytestmark = pytest.mark.cluster
DEADLINE_S = 240


SWEEP = {"tune__job": "finetune", "tune__space": "lora_rank", "finetune__max_steps": 2}


def kill_after_the_first_trial(config, folder):
    """Run the sweep in a process of its own and kill it once a trial has finished; return that trial's manifest."""
    path = folder / "tiny.toml"
    path.write_text(to_toml(config))
    log = (folder / "log").open("w")
    driver = subprocess.Popen([sys.executable, "-m", "ray_jobs", "tune", str(path)], start_new_session=True, stdout=log, stderr=log)
    trials = RunFolder(config).folder("tune").sub("trials")
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and driver.poll() is None:
        for name in trials.names():
            if trials.exists(f"{name}/finetune/manifest.json"):
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
                assert trials.names() == [name]  # [tune] max_concurrent_trials is 1
                return name, trials.read_json(f"{name}/finetune/manifest.json")
        time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGKILL)
    raise AssertionError((folder / "log").read_text())


def test_a_killed_sweep_goes_on_and_ends_in_a_table_and_a_ready_config(prepared, tmp_path, capfd):
    config = prepared(**SWEEP)
    name, finished = kill_after_the_first_trial(config, tmp_path)
    capfd.readouterr()
    manifest = tune.run(config, force=False)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err

    stage = RunFolder(config).folder("tune")
    assert stage.read_json(f"trials/{name}/finetune/manifest.json") == finished  # not run again
    rows = stage.read_json("results.json")
    assert [row["status"] for row in rows] == ["done", "done", "failed"]
    assert {row["values"]["finetune.lora.rank"] for row in rows} == {4, 16, 64}
    assert rows[0]["eval"]["teacher_nats"] <= rows[1]["eval"]["teacher_nats"]
    assert "64" in rows[2]["reason"]  # the tiny model's layers are narrower
    assert rows[2]["eval"] == {}
    assert manifest["counts"] == {"trials": 3, "done": 2, "failed": 1}
    assert all(f"rank {rank}:" in "\n".join(manifest["headline"]) for rank in (4, 16, 64))

    best = load_config(f"{stage.uri}/best.toml")
    assert best.finetune.lora.rank == rows[0]["values"]["finetune.lora.rank"]
    assert best.finetune.max_steps == 2
    assert RunFolder(best).finished("prepare") == RunFolder(config).finished("prepare")
    assert not stage.exists("ray")

    assert tune.run(config, force=False) == manifest
    with pytest.raises(ConfigChanged, match=r"finetune\.learning_rate"):
        tune.run(config.model_copy(update={"finetune": config.finetune.model_copy(update={"learning_rate": 1.0})}), force=False)


def test_a_sweep_is_refused_before_it_starts_where_it_cannot_run(ray_cluster, tiny_config, tmp_path):
    with pytest.raises(StageMissing, match="'prepare' has not finished"):
        tune.run(tiny_config(**SWEEP), force=False)
    assert not (tmp_path / "runs").exists()
