"""Sharded strategies under Ray Train: two workers end in the adapter of one process."""

import pytest
import torch
from safetensors.torch import load_file

from ray_jobs import finetune
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.loop import train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.strategies.base import trainable

pytestmark = pytest.mark.cluster


def in_this_process(config):
    torch.manual_seed(config.run.seed)
    model = add_lora(load_model(config.teacher.model, dtype=torch.float32), rank=4, alpha=32, dropout=0.0, targets="all-linear")
    rows = PackedRows(RunFolder(config).folder("prepare").local("train"))
    recipe = Recipe.of(config.finetune.model_dump(), seed=config.run.seed)
    progress = train(model, cross_entropy_loss, rows, eval_rows=None, recipe=recipe)
    losses = [line["loss"] for line in progress.log if "loss" in line]
    return losses, {name.replace(".default.", "."): weight.detach() for name, weight in trainable(model).items()}


@pytest.mark.parametrize("strategy", [{"strategy": "fsdp"}, {"strategy": "deepspeed", "zero_stage": 3}], ids=lambda each: each["strategy"])
def test_two_workers_end_in_the_adapter_of_one_process(prepared, strategy):
    overrides = {f"workers__{key}": value for key, value in strategy.items()}
    config = prepared(workers__num_workers=2, finetune__dtype="float32", **overrides)
    manifest = finetune.run(config, force=False)
    stage = RunFolder(config).folder("finetune")
    losses, adapter = in_this_process(config)
    assert [line["loss"] for line in stage.read_jsonl("metrics.jsonl") if "loss" in line] == pytest.approx(losses, rel=1e-4)
    saved = load_file(stage.local("adapter") / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, adapter[name], rtol=1e-2, atol=1e-3)
    assert manifest["counts"]["trainable_parameters"] == sum(weight.numel() for weight in adapter.values())
    assert manifest["counts"]["total_parameters"] > manifest["counts"]["trainable_parameters"]
