"""Encoders taught through the verb on a real cluster: each task, two workers of whom one is killed, a folder that loads by itself."""

import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from ray_jobs import distill_encoder, prepare
from ray_jobs.core.models import resolve_model
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.distillation.influence import most_influential
from ray_jobs.training.loop import train
from ray_jobs.training.recipe import Recipe

pytestmark = pytest.mark.cluster
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
LOAD = """
import sys
sys.modules["ray_jobs"] = sys.modules["ray"] = sys.modules["peft"] = None  # importing them fails
import transformers
model, info = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
tokens = transformers.AutoTokenizer.from_pretrained(sys.argv[1])("hello", return_tensors="pt")
model(**tokens)
print(model.config.num_hidden_layers, "layers")
"""


@pytest.fixture
def encoder_config(tiny_config, tmp_path, ray_cluster):
    """A function of a model class and overrides: a config with a random tiny encoder as teacher, whose `prepare` has finished."""

    def make(kind, task, *, labels=2, **overrides):
        torch.manual_seed(0)
        folder = tmp_path / kind.__name__
        kind(BertConfig(vocab_size=30522, initializer_range=0.4, num_labels=labels, **SHAPE)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(resolve_model("minilm-l6")).save_pretrained(folder)
        shared = {"teacher__model": str(folder), "distill__task": task, "distill__dtype": "float32", "data__chunk_tokens": 32}
        config = tiny_config(**shared | {"distill__learning_rate": 1e-3, "run__trackers": []} | overrides)
        prepare.run(config, force=False)
        return config

    return make


def stage_of(config):
    return RunFolder(config).folder("distill")


def weights_of(config):
    return load_file(stage_of(config).local("student") / "model.safetensors")


def assert_plain(config, kind):
    """Fail where the student needs raystill to be loaded, lacks a weight, or tells of this machine."""
    folder = stage_of(config).local("student")
    assert not [path.name for path in folder.rglob("*.json") if str(folder.parents[2]) in path.read_text()]
    assert str(folder.parents[2]) not in (folder / "README.md").read_text()
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(folder), kind.__name__], cwd=folder, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "2 layers"


def without_ray(config, out):
    """Train as the config says in this process; returns the weights before and after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    job, rows = distill_encoder.encoder_job(config), RunFolder(config).folder("prepare")
    model, loss = job.build("cpu")
    job.export(model, out / "before")
    recipe = Recipe.of(config.distill.model_dump(), seed=config.run.seed)
    train(model, loss, job.open_rows(rows.local("train")), eval_rows=job.open_rows(rows.local("eval")), recipe=recipe)
    job.export(model, out / "after")
    torch.set_num_threads(threads)
    return [load_file(out / name / "model.safetensors") for name in ("before", "after")]


def kill_one_worker(config, killed):
    """Kill a training worker of this session's cluster once a checkpoint is there."""
    checkpoints, ended = stage_of(config).sub("checkpoints"), time.monotonic() + 120
    while not any(name.startswith("step-") for name in checkpoints.names()):
        assert time.monotonic() < ended
        time.sleep(0.02)
    workers = [p for p in psutil.Process().children(recursive=True) if any("RayTrainWorker" in word for word in p.cmdline())]
    workers[-1].kill()
    killed.append(workers[-1].pid)


def test_two_workers_one_of_them_killed_teach_masked_tokens_like_one_undisturbed(encoder_config, tmp_path):
    hidden = {"distill__hidden_weight": 1.0, "distill__hidden_layers": "mapped", "workers__num_workers": 2}
    config = encoder_config(BertForMaskedLM, "masked_language_model", distill__max_steps=30, **hidden)
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_worker, args=(config, killed))
    killer.start()
    manifest = distill_encoder.run(config, force=False)
    killer.join()
    assert killed and len(manifest["peak_bytes"]) == 2
    before, after = without_ray(config, tmp_path)
    ended = weights_of(config)
    assert ended.keys() == after.keys()
    # a bias of the keys shifts all scores of a query alike: its gradient is rounding, which Adam blows up to whole steps
    compared = [name for name in after if "key.bias" not in name]
    apart, moved = (sum((after[name] - other[name]).square().sum() for name in compared).sqrt() for other in (ended, before))
    assert apart < 1e-3 * moved
    assert manifest["eval"]["kl_after"] < manifest["eval"]["kl_before"]
    assert_plain(config, BertForMaskedLM)


def test_embeddings_from_the_most_influential_layers(encoder_config):
    losses = {"distill__embedding_weight": 1.0, "distill__hidden_weight": 1.0, "distill__hidden_layers": "mapped"}
    config = encoder_config(BertModel, "embedding", student__choose="influence", distill__micro_batch_size=4, **losses)
    manifest = distill_encoder.run(config, force=False)
    found = stage_of(config).read_json("influence.json")
    assert manifest["layers"] == most_influential(found["influence"], 2) and found["positions"] > found["rows"] > 0
    assert manifest["eval"]["embedding_after"] < manifest["eval"]["embedding_before"]
    assert manifest["memory_plan"]["predicted_bytes"] > 0 and "memory: predicted" in manifest["headline"][1]
    assert_plain(config, BertModel)
    card = (stage_of(config).local("student") / "README.md").read_text()
    kept = ", ".join(map(str, manifest["layers"]))
    for words in (
        "pipeline_tag: feature-extraction",
        f"layers {kept} of the teacher",
        "Teacher: BertModel, as it is",
        "| sentence embeddings | 1 |",
    ):
        assert words in card
    assert f"| 1 - cosine to the teacher's embedding | {manifest['eval']['embedding_before']:.4g} |" in card
    assert distill_encoder.run(config, force=False)["id"] == manifest["id"]


def test_classes_of_texts_with_and_without_labels(encoder_config, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "text number {i} of the course", "label": "LABEL_{i % 3}"}}\n' for i in range(24)))
    config = encoder_config(BertForSequenceClassification, "classification", labels=3, data__texts=[str(texts)], distill__max_steps=12)
    manifest = distill_encoder.run(config, force=False)
    found = manifest["eval"]
    assert found["kl_after"] < found["kl_before"] and 0 <= found["agreement_after"] <= 1
    assert "| forward_kl at temperature 2 | 0.9 |" in (stage_of(config).local("student") / "README.md").read_text()
    assert_plain(config, BertForSequenceClassification)
