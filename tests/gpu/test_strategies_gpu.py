"""Every strategy on a GPU, in float16 and bfloat16: NCCL, loss scaling and the optimizer's CUDA path. One process is enough for both."""

import pytest
import torch
import torch.distributed as dist
from packed_rows import write_rows

from ray_jobs.training.adapters import add_lora
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.loop import train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.strategies import choose_strategy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
STRATEGIES = [
    {"name": "ddp"},
    {"name": "fsdp"},
    *({"name": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)),
    {"name": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_step_in_half_precision_is_near_the_float32_one(tiny_model, tmp_path, strategy, method, dtype):
    rows = PackedRows(write_rows(tmp_path / "rows", [(9, 7), (12,), (5, 5, 6), (16,)]))

    def losses(strategy, dtype):
        torch.manual_seed(0)
        weights = torch.float32 if method == "full" else getattr(torch, dtype)
        model = load_model(tiny_model, dtype=weights, device="cuda:0")
        if method == "lora":
            model = add_lora(model, rank=4, alpha=8, dropout=0.0, targets="all-linear")
        recipe = Recipe(max_steps=4, learning_rate=1e-3, global_batch_size=4, dtype=dtype)
        progress = train(model, cross_entropy_loss, rows, eval_rows=None, recipe=recipe, strategy=choose_strategy(**strategy))
        return [line["loss"] for line in progress.log if "loss" in line]

    try:
        assert losses(strategy, dtype) == pytest.approx(losses({"name": "ddp"}, "float32"), rel=2e-2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
