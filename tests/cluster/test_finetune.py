"""finetune on a real cluster: the same result whatever is killed; a worker past its memory; requests no node can hold."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ray_jobs import finetune
from ray_jobs.core.errors import ClusterError, ConfigError, StageHeld, StageMissing
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.checkpoint import trainable
from ray_jobs.training.loop import train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe

pytestmark = pytest.mark.cluster
LONG = {"finetune__max_steps": 60, "finetune__checkpoint_every_steps": 5, "finetune__dtype": "float32"}


def stage_of(config):
    return RunFolder(config).folder("finetune")


def adapter_of(config):
    return load_file(stage_of(config).local("adapter") / "adapter_model.safetensors")


def without_ray(config):
    """Train as the config says in this process, and return the progress and the adapter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(config.run.seed)
    lora = config.finetune.lora.model_dump(exclude={"plus_ratio"})
    model = add_lora(load_model(config.teacher.model, dtype=torch.float32), **lora)
    rows = RunFolder(config).folder("prepare")
    progress = train(
        model,
        cross_entropy_loss,
        PackedRows(rows.local("train")),
        eval_rows=PackedRows(rows.local("eval")),
        recipe=Recipe.of(config.finetune.model_dump(), seed=config.run.seed),
    )
    torch.set_num_threads(threads)
    return progress, {name.replace(".default.", "."): p.detach() for name, p in trainable(model).items()}


def wait_for(condition, *, timeout_s=120):
    ended = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > ended:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.05)


def wait_for_step(config, *, step):
    """Wait until a step is logged from now on; lines are written every few seconds at most, so it is some step after it."""
    began = time.time()
    log = stage_of(config).local("metrics.jsonl")
    wait_for(lambda: log.exists() and log.stat().st_mtime > began and stage_of(config).read_jsonl("metrics.jsonl")[-1]["step"] >= step)


def wait_for_holder(config, process):
    lock = RunFolder(config).storage
    wait_for(lambda: lock.exists("finetune.lock") and lock.read_json("finetune.lock")["pid"] == process.pid)


def tear_what_the_driver_left(checkpoints):
    """Leave a newer checkpoint half written, as a kill in mid-write does, and Ray's register of checkpoints too."""
    newest = max(name for name in checkpoints.names() if name.startswith("step-"))
    whole = checkpoints.local(newest)
    torn = whole.with_name("step-000099")
    shutil.copytree(whole, torn)
    weights = torn / "trainable-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    register = checkpoints.local("checkpoint_manager_snapshot.json")
    register.write_bytes(register.read_bytes()[:-10])


def kill_one_worker(config, step, killed):
    wait_for_step(config, step=step)
    workers = [p for p in psutil.Process().children(recursive=True) if any("RayTrainWorker" in word for word in p.cmdline())]
    workers[-1].kill()
    killed.append(workers[-1].pid)


def assert_log_is_that_of(progress, config, what):
    lines = stage_of(config).read_jsonl("metrics.jsonl")
    assert [(line["step"], "loss" in line) for line in lines] == [(line["step"], "loss" in line) for line in progress.log]
    losses, expected = ([line["loss"] for line in log if "loss" in line] for log in (lines, progress.log))
    assert losses == pytest.approx(expected, rel=1e-4), what


def test_two_workers_one_of_them_killed_end_like_one_undisturbed(prepared):
    config = prepared(**LONG, workers__num_workers=2)
    killed, step = [], random.randrange(6, 40)
    killer = threading.Thread(target=kill_one_worker, args=(config, step, killed))
    killer.start()
    manifest = finetune.run(config, force=False)
    killer.join()
    assert killed
    progress, adapter = without_ray(config)
    assert_log_is_that_of(progress, config, f"worker killed after step {step}")
    for name, tensor in adapter_of(config).items():
        torch.testing.assert_close(tensor, adapter[name], rtol=1e-2, atol=1e-3)
    assert len(manifest["peak_bytes"]) == 2
    assert manifest["eval"]["teacher_nats"] < manifest["eval"]["base_nats"]


def test_a_driver_stopped_then_killed_goes_on_past_torn_files_and_ends_in_the_very_same_adapter(prepared, tmp_path):
    config = prepared(**LONG)
    file = tmp_path / "run.toml"
    file.write_text(as_toml(config.model_dump(mode="json", exclude_defaults=True)))
    command = [sys.executable, "-m", "ray_jobs", "finetune", str(file)]
    steps = sorted(random.sample(range(6, 40), 2))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        wait_for_step(config, step=steps[0])
        driver.send_signal(signal.SIGTERM)  # as a scheduler does that takes the machine back
        assert driver.communicate()[1].endswith("raystill: interrupted; the same command goes on from here\n")
    assert driver.returncode == 130
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        wait_for_holder(config, driver)
        with pytest.raises(StageHeld, match=f"process {driver.pid} "):
            finetune.run(config, force=True)
        wait_for_step(config, step=steps[1])
        driver.send_signal(signal.SIGKILL)
    assert not stage_of(config).exists("manifest.json")
    tear_what_the_driver_left(stage_of(config).sub("checkpoints"))
    manifest = finetune.run(config, force=False)
    progress, adapter = without_ray(config)
    assert_log_is_that_of(progress, config, f"driver stopped after step {steps[0]}, killed after step {steps[1]}")
    for name, tensor in adapter_of(config).items():
        torch.testing.assert_close(tensor, adapter[name], rtol=0, atol=0)
    assert manifest["eval"] == {"base_nats": progress.eval_before["loss"], "teacher_nats": progress.eval_after["loss"]}
    assert stage_of(config).names() == ["adapter", "manifest.json", "metrics.jsonl", "result.json", "started.json", "tensorboard"]
    assert (
        json.loads((stage_of(config).local("adapter") / "adapter_config.json").read_text())["base_model_name_or_path"]
        == config.teacher.model
    )
    assert finetune.run(config, force=False) == manifest


def as_toml(tree):
    lines = []
    for section, fields in tree.items():
        flat = {key: value for key, value in fields.items() if not isinstance(value, dict)}
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in flat.items())]
        for name, inner in fields.items():
            if isinstance(inner, dict):
                lines += [f"[{section}.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in inner.items())]
    return "\n".join(lines)


def test_what_cannot_fit_is_refused_with_the_table_before_anything_starts(prepared, capsys):
    config = prepared(workers__memory="350MiB")  # less than torch itself
    with pytest.raises(ConfigError, match=r"LoRA r=4, .* needs .* \[workers\] memory gives 0.34 GiB") as caught:
        finetune.run(config, force=False)
    assert "\n" not in str(caught.value)
    assert "GB per worker" in capsys.readouterr().err
    assert not RunFolder(config).storage.exists("finetune")


def test_what_no_node_can_hold_is_refused_at_once(prepared):
    for field, value in {"cpus": 64, "gpus": 8, "memory": "900GiB", "num_workers": 50}.items():
        config = prepared(**{f"workers__{field}": value})
        started = time.monotonic()
        with pytest.raises(ClusterError, match=r"\[workers\] of finetune needs .* but this cluster can hold"):
            finetune.run(config, force=False)
        assert time.monotonic() - started < 10
        assert stage_of(config).names() == ["started.json"]


def test_bad_adapters_are_refused_before_anything_is_written(prepared):
    for wrong, message in (({"finetune__lora": {"rank": 999}}, "rank = 999"), ({"finetune__lora": {"targets": ["wq"]}}, "q_proj")):
        config = prepared(**wrong)
        with pytest.raises(ConfigError, match=message):
            finetune.run(config, force=False)
        assert not RunFolder(config).storage.exists("finetune")


def test_finetune_before_prepare_names_the_command(tiny_config):
    with pytest.raises(StageMissing, match="raystill prepare"):
        finetune.run(tiny_config(), force=False)
