"""Every method learns on the one training loop, whatever stores the base and whichever optimizer steps."""

import json
import shutil

import pytest
import torch
from packed_rows import write_rows
from safetensors.torch import load_file

from ray_jobs import distill, finetune, prepare
from ray_jobs.core.errors import ConfigError, ModelError
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.checkpoint import trainable
from ray_jobs.training.loop import train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import Quantization, choose_dtype, load_model
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,)]
RECIPE = {"max_steps": 10, "learning_rate": 1e-2, "global_batch_size": 4, "dtype": "bfloat16", "checkpoint_every_steps": 5}


@pytest.fixture
def rows(tmp_path):
    return PackedRows(write_rows(tmp_path / "train", SEGMENTS)), PackedRows(write_rows(tmp_path / "eval", SEGMENTS[:3]))


def prepare_model(folder, method, **options):
    torch.manual_seed(0)
    if method == "full":
        return load_model(folder, dtype=torch.float32)
    quantization = None if method == "lora" else Quantization(method)
    base = load_model(folder, dtype=torch.bfloat16, quantization=quantization)
    return add_lora(base, rank=4, alpha=8, dropout=0.0, targets="all-linear", **options)


def train_rows(model, rows, **changes):
    options = {key: changes.pop(key) for key in ("resume_from", "on_checkpoint") if key in changes}
    return train(model, cross_entropy_loss, rows[0], eval_rows=rows[1], recipe=Recipe(**(RECIPE | changes)), **options)


@pytest.mark.parametrize(
    ("method", "options", "changes"),
    [
        ("full", {}, {}),
        ("lora", {}, {"gradient_checkpointing": True}),
        ("lora", {"rslora": True, "dora": True}, {"plus_ratio": 4.0, "learning_rate": 3e-3}),
        ("nf4", {}, {"optimizer": "paged_adamw_8bit"}),
        ("nf4", {"dora": True}, {"plus_ratio": 4.0, "learning_rate": 3e-3, "optimizer": "adamw_8bit"}),
        ("fp4", {}, {}),
        ("int8", {}, {"gradient_checkpointing": True}),
    ],
)
def test_each_method_lowers_the_held_out_loss(tiny_model, rows, method, options, changes):
    model = prepare_model(tiny_model, method, **options)
    progress = train_rows(model, rows, **changes)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert progress.eval_after["loss"] < progress.eval_before["loss"] - 0.1


@pytest.mark.parametrize(("method", "plus_ratio"), [("int8", 4.0), ("full", None)])
def test_a_run_with_8_bit_moments_goes_on_from_its_checkpoint_to_the_very_same_weights(tiny_model, rows, tmp_path, method, plus_ratio):
    changes = {"optimizer": "adamw_8bit", "plus_ratio": plus_ratio}

    def keep(step, save):
        if step == 5:
            (tmp_path / "checkpoint").mkdir()
            save(tmp_path / "checkpoint")

    whole = prepare_model(tiny_model, method)
    train_rows(whole, rows, on_checkpoint=keep, **changes)
    resumed = prepare_model(tiny_model, method)
    train_rows(resumed, rows, resume_from=tmp_path / "checkpoint", **changes)
    for name, parameter in trainable(whole).items():
        torch.testing.assert_close(trainable(resumed)[name], parameter, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data__max_length": 4096}, r"data.max_length = 4096 is above the 2048 positions of model .*at most 2048"),
        ({"finetune__quantization": {"type": "int8"}, "finetune__lora": {"dora": True}}, r"dora = true .*on a CPU"),
        ({"finetune__lora": {"rank": 33}}, r"rank = 33 is larger than layer"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(tiny_config, wrong, message):
    with pytest.raises(ConfigError, match=message):
        finetune.check(tiny_config(finetune__method="qlora", **wrong))


def test_rows_longer_than_a_models_positions_are_refused_by_every_stage_that_makes_or_reads_them(tiny_config):
    for verb in (prepare, finetune, distill):
        with pytest.raises(ConfigError, match=r"4096 is above the 2048 positions"):
            verb.check(tiny_config(data__max_length=4096))


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_quantized_folder_is_refused_but_for_lora(tiny_config, tiny_model, tmp_path, method):
    folder = shutil.copytree(tiny_model, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match=rf"quantized already \(gptq\) and finetune.method = {method} needs plain weights") as caught:
        finetune.check(tiny_config(teacher__model=str(folder), finetune__method=method))
    assert caught.value.exit_code == 2


def test_a_model_trained_whole_is_written_in_the_type_it_was_computed_in_wherever_it_lies_by_then(tiny_model, tmp_path):
    model = load_model(tiny_model, dtype=torch.float32)
    finetune._export(str(tiny_model), "auto", "cuda", model, tmp_path)  # on the CPU, as after a strategy that held pieces of it
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == choose_dtype("auto", "cuda") != torch.float32
