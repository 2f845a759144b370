"""On a GPU the paged optimizer really pages 8-bit moments, and each storage of a base trains and merges."""

import pytest
import torch

from ray_jobs.training.adapters import add_lora, load_merged
from ray_jobs.training.models import Quantization, load_model
from ray_jobs.training.optimizers import build_optimizer, load_parameter_states, parameter_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def one_step(model, optimizer):
    ids = torch.randint(5, 49000, (2, 32), generator=torch.Generator().manual_seed(0)).cuda()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def test_paged_moments_are_bytes_in_pages_also_after_a_checkpoint(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32, device="cuda").train()
    optimizer = build_optimizer(model, name="paged_adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
    one_step(model, optimizer)
    again = build_optimizer(model, name="paged_adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
    load_parameter_states(again, ((parameter, parameter_state(optimizer, parameter)) for parameter in model.parameters()))
    embedding = model.get_input_embeddings().weight
    for one in (optimizer, again):
        moment = one.state[embedding]["state1"]
        assert moment.dtype is torch.uint8
        assert moment.is_paged
    assert torch.equal(optimizer.state[embedding]["state1"].cpu(), again.state[embedding]["state1"].cpu())


@pytest.mark.parametrize("type_", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_each_storage_learns_and_merges(tiny_model, tmp_path, type_, dora):
    quantization = Quantization(type_, True)
    base = load_model(tiny_model, dtype=torch.float16, quantization=quantization, device="cuda")
    model = add_lora(base, rank=4, alpha=8, dropout=0.0, targets="all-linear", dora=dora).train()
    optimizer = build_optimizer(model, name="paged_adamw_8bit", learning_rate=1e-2, weight_decay=0.0)
    losses = [one_step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    merged = load_merged(tiny_model, tmp_path, dtype=torch.float16, quantization=quantization, device="cuda")
    ids = torch.arange(10, 42, device="cuda")[None]
    with torch.no_grad():
        expected, seen = model.eval()(ids).logits.float(), merged(ids).logits.float()
    assert float((seen - expected).norm() / expected.norm()) < 0.05
