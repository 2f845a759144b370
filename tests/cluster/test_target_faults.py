"""A distillation with pool and cache while everything is killed once: the weights of an undisturbed run, no target computed twice."""

import collections
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import target_job
import torch
from packed_rows import write_rows
from safetensors import safe_open
from safetensors.torch import load_file

from ray_jobs.core.storage import Storage

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
EPOCH = len(target_job.SEGMENTS) // target_job.RECIPE.global_batch_size


@pytest.fixture
def places(tmp_path, tiny_model):
    """Stage, rows, model and cache, as target_job takes them."""
    write_rows(tmp_path / "rows" / "train", target_job.SEGMENTS)
    return [str(place) for place in (tmp_path / "stage", tmp_path / "rows", tiny_model, tmp_path / "cache")]


def start(places):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, target_job.__file__, *places], env=environment, stderr=subprocess.DEVNULL)


def await_step(places, step, driver):
    checkpoints = Storage(places[0]).sub("checkpoints")
    ended = time.monotonic() + 300
    while not any(int(name.removeprefix("step-")) >= step for name in checkpoints.names() if name.startswith("step-")):
        assert driver.poll() is None and time.monotonic() < ended, f"no checkpoint from step {step} on"
        time.sleep(0.02)


def kill_actor(name):
    """Kill the processes of that name of this session's cluster, which are descendants of this process."""
    found = [process for process in psutil.Process().children(recursive=True) if name in " ".join(process.cmdline())]
    assert found, f"no {name} runs"
    for process in found:
        process.kill()


def kill(driver):
    driver.kill()
    driver.wait()


def test_everything_is_killed_and_a_shard_damaged(ray_cluster, places):
    driver = start(places)
    await_step(places, 3, driver)
    kill_actor("TeacherActor")
    await_step(places, 9, driver)
    kill_actor("RayTrainWorker")
    await_step(places, EPOCH // 2, driver)
    kill(driver)
    driver = start(places)
    await_step(places, EPOCH + 6, driver)
    kill(driver)
    shards = sorted(Path(places[3]).rglob("shard-*"))
    keys = collections.Counter(key for shard in shards for key in safe_open(shard, "np").keys())
    assert len(keys) == len(target_job.SEGMENTS)
    assert set(keys.values()) == {1}, "a target that was kept was computed again"
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    flipped = bytearray(shards[1].read_bytes())
    flipped[-9] ^= 1
    shards[1].write_bytes(flipped)
    result = target_job.run(*places)
    assert result["loss_counts"]["targets_computed"] <= 2 * len(target_job.SEGMENTS)
    student = load_file(Path(places[0]) / "student" / "model.safetensors")
    # a damaged row is computed again beside other rows than at first, which rounds its last bit otherwise
    undisturbed = target_job.alone(*places[1:3])
    torch.testing.assert_close(student, {name: undisturbed[name] for name in student}, rtol=0, atol=1e-6)
