"""distill as a user runs it where the student learns from answers of its own."""

import os
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ray_jobs import distill, finetune, prepare
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.loop import train
from ray_jobs.training.recipe import Recipe

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("taught")


@pytest.fixture
def taught(tiny_config, ray_cluster, storage):
    """A run's config as a function of overrides; its `prepare` and `finetune` are one run's for all tests here."""
    first = tiny_config(run__storage=str(storage), finetune__max_steps=2)
    prepare.run(first, force=False)
    finetune.run(first, force=False)
    return lambda **overrides: tiny_config(run__stages_from=[str(storage / "tiny")], **overrides)


def test_own_answers_go_on_after_a_lost_worker_as_in_one_undisturbed_process(taught):
    own = {"share": 0.5, "max_new_tokens": 6}
    options = {"distill__on_policy": own, "distill__divergence": "reverse_kl", "distill__learning_rate": 1e-3}
    config = taught(distill__max_steps=12, distill__max_failures=1, distill__dtype="float32", **options)
    killed: list[int] = []
    killer = threading.Thread(target=kill_worker_after, args=(config, 4, killed))
    killer.start()
    manifest = distill.run(config, force=False)
    killer.join()
    assert len(killed) == 1
    lines = metrics(config)
    assert [line["counts"]["on_policy_tokens"] > 0 for line in lines] == [False, True] * 6
    assert manifest["on_policy"]["tokens"] == sum(line["counts"]["on_policy_tokens"] for line in lines)
    folder = RunFolder(config)
    job = distill.make_job(config, folder.model("teacher"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student, loss = job.build(job.student_from(job.first_start()), {}, 1, {}, "cpu")
    rows = PackedRows(folder.folder("prepare").local("train"))
    train(student, loss, rows, eval_rows=None, recipe=Recipe.of(config.distill.model_dump(), seed=config.run.seed))
    torch.set_num_threads(threads)
    undisturbed, written = student.state_dict(), load_file(folder.folder("distill").local("student") / "model.safetensors")
    torch.testing.assert_close(written, {name: undisturbed[name] for name in written}, rtol=0, atol=1e-6)


def kill_worker_after(config, step, killed):
    """Kill the training worker once a checkpoint of that step, or a later one, is there."""
    checkpoints = RunFolder(config).storage.sub("distill").sub("checkpoints")
    ended = time.monotonic() + 120
    while not any(int(name.removeprefix("step-")) >= step for name in checkpoints.names() if name.startswith("step-")):
        if time.monotonic() > ended:
            return
        time.sleep(0.02)
    for process in psutil.Process(os.getpid()).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)


def metrics(config):
    """Return the lines of the steps."""
    return [line for line in RunFolder(config).folder("distill").read_jsonl("metrics.jsonl") if "loss" in line and "step" in line]
