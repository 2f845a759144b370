"""A teacher trained whole goes through the chain like one with an adapter; `--merge` writes the model that was trained."""

import json

import pytest
import torch
from safetensors import safe_open

from ray_jobs import distill, finetune, prepare
from ray_jobs.__main__ import main
from ray_jobs.compress import Work, _plain_models
from ray_jobs.core.config_file import to_toml
from ray_jobs.core.errors import DataError
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.distillation.start import Start
from ray_jobs.training.adapters import load_merged
from ray_jobs.training.models import Quantization, choose_dtype, load_model
from serve.engines import open_engine

pytestmark = pytest.mark.cluster
IDS = torch.arange(10, 42)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_teacher_trained_whole_is_the_teacher_of_every_later_stage(prepared):
    config = prepared(finetune__method="full", finetune__max_steps=3, finetune__optimizer="paged_adamw_8bit", finetune__dtype="bfloat16")
    manifest = finetune.run(config, force=False)
    folder = RunFolder(config)
    assert manifest["eval"]["teacher_nats"] < manifest["eval"]["base_nats"]
    assert manifest["optimizer"].startswith("adamw_8bit (paged_adamw_8bit")
    assert "teacher" in folder.folder("finetune").names()
    assert not {"adapter", "checkpoints"} & set(folder.folder("finetune").names())
    source = folder.model("teacher")
    assert source.adapter is None
    written = load_model(source.model, dtype=torch.float32)
    with safe_open(f"{source.model}/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert not torch.allclose(logits(written), logits(load_model(config.teacher.model, dtype=torch.float32)), atol=1e-3)

    start = Start(source.model, (0, 3), source.adapter)
    job = distill.make_job(config, source)
    student, loss = job.build(job.student_from(start), {}, 1, {}, "cpu")
    assert torch.equal(logits(loss.targets.model.float()), logits(written))
    assert torch.equal(student.get_input_embeddings().weight, written.get_input_embeddings().weight)
    engine = open_engine(**source._asdict(), dtype="float32", device="cpu")
    assert torch.equal(logits(engine.model), logits(written))
    assert engine.generate(["The kernel"], max_new_tokens=2)[0].completion_tokens > 0
    teacher = _plain_models(Work(config, source, *[folder.folder("prepare")] * 2, folder.folder("compress")), "cpu")[1]
    assert torch.equal(logits(teacher.open()._model), logits(written))


def test_merge_writes_the_model_that_was_trained_also_after_the_run(prepared, tmp_path, capsys):
    config = prepared(finetune__method="qlora", finetune__max_steps=2, finetune__quantization={"type": "fp4"})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    trained = finetune.run(config, force=False)
    stage = RunFolder(config).folder("finetune")
    (stage.local("merged")).mkdir()  # as a merge leaves it that is killed while it uploads to an object store
    capsys.readouterr()
    assert main(["finetune", str(file), "--merge", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {key: shown[key] for key in trained if key != "headline"} == {key: trained[key] for key in trained if key != "headline"}
    assert shown["headline"][-1].startswith("finetune: merged: ")
    dtype = choose_dtype(config.finetune.dtype)
    merged = load_model(stage.local("merged"), dtype=dtype)
    expected = load_merged(config.teacher.model, stage.local("adapter"), dtype=dtype, quantization=Quantization("fp4", True))
    assert torch.equal(logits(merged), logits(expected))
    assert not list(stage.local("merged").glob("*adapter*")) and (stage.local("merged") / "tokenizer.json").exists()
    assert main(["finetune", str(file), "--merge"]) == 0
    assert "merged already" in capsys.readouterr().err


def test_pairs_that_are_all_longer_than_a_row_are_one_clear_error(tiny_config, ray_cluster, tiny_course):
    config = tiny_config(data={"pairs": [str(tiny_course / "pairs.jsonl")], "max_length": 16})
    with pytest.raises(DataError, match=r"nothing is left to train on of 1 files \(24 too long; first: .*tokens, a row has 16\)"):
        prepare.run(config, force=False)
    assert not RunFolder(config).storage.exists("prepare")
