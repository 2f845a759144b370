"""Weights read part by part: the model they come to, what cannot be read so, and how much less a worker holds at most."""

import functools
import gc
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from ray_jobs.core.errors import ModelError
from ray_jobs.core.memory import peak_bytes, reset_peak
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.allocator import return_freed_memory
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model
from ray_jobs.training.optimizers import build_optimizer
from ray_jobs.training.postponed import fill, is_postponed, postponed_model
from ray_jobs.training.strategies import choose_strategy
from ray_jobs.training.strategies.base import LossModule

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
LARGE = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}


def saved(config, folder, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [LlamaConfig(**SMALL, tie_word_embeddings=True), Qwen2Config(**SMALL)], ids=["tied", "several-files"])
def test_a_filled_model_is_what_transformers_loads(tmp_path, config, dtype):
    saved(config, tmp_path, max_shard_size="200KB" if config.model_type == "qwen2" else "1GB")
    whole, model = (load_model(tmp_path, dtype=dtype, postponed=postponed) for postponed in (False, True))
    assert all(is_postponed(parameter) for parameter in model.parameters())
    assert not any(is_postponed(parameter) for parameter in whole.parameters())
    fill(model)
    assert not any(is_postponed(parameter) for parameter in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    for kind in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(whole, kind)()), dict(getattr(model, kind)())
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config == whole.generation_config
    assert model.training == whole.training


def test_what_names_do_not_match_is_loaded_whole_and_says_why(tmp_path, capsys):
    saved(LlamaConfig(**SMALL), tmp_path / "other")
    LlamaConfig(**SMALL | {"num_hidden_layers": 4}).save_pretrained(tmp_path / "other")
    reason = postponed_model(tmp_path / "other", dtype=torch.float32, device="cpu")
    assert reason == "its files have no model.layers.3.self_attn.q_proj.weight of shape (64, 64)"

    saved(LlamaConfig(**SMALL), tmp_path / "untied")
    LlamaConfig(**SMALL, tie_word_embeddings=True).save_pretrained(tmp_path / "untied")
    model = load_model(tmp_path / "untied", dtype=torch.float32, postponed=True)
    assert not any(is_postponed(parameter) for parameter in model.parameters())
    assert "its files have lm_head.weight, which its config ties to another" in capsys.readouterr().err


def test_a_file_that_ends_early_is_an_error_of_the_model(tmp_path):
    saved(LlamaConfig(**SMALL), tmp_path)
    model = load_model(tmp_path, dtype=torch.float32, postponed=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors ends \d+ bytes early: copy the model anew"):
        fill(model)


def peak(folder, strategy, *, postponed):
    """Return how many bytes a process held at most while it loaded a model and cut it."""
    gc.collect()
    assert reset_peak()
    model = load_model(folder, dtype=torch.float32, postponed=postponed)
    module = LossModule(add_lora(model, rank=4, alpha=8, dropout=0.0, targets=["q_proj"]), cross_entropy_loss, torch.float32)
    make = functools.partial(build_optimizer, name="adamw", learning_rate=1e-3, weight_decay=0.0)
    chosen = choose_strategy(**strategy)
    chosen.prepare(module, make, dtype=torch.float32, max_grad_norm=1.0)
    chosen.release()
    return peak_bytes()


def _worker(process, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=2)
    torch.set_num_threads(1)
    assert return_freed_memory()  # what is measured is what tensors take
    fsdp, zero = {"name": "fsdp"}, {"name": "deepspeed", "zero_stage": 3}
    before = max(peak(folder / "small", strategy, postponed=True) for strategy in (fsdp, zero))  # with what libraries make once
    cases = {"fsdp": (fsdp, True), "zero": (zero, True), "whole": (fsdp, False)}
    grown = {name: peak(folder / "large", strategy, postponed=postponed) - before for name, (strategy, postponed) in cases.items()}
    torch.save(grown, folder / f"{process}.pt")
    dist.destroy_process_group()


def test_a_worker_never_holds_all_of_a_model_that_is_cut_into_pieces(tmp_path, monkeypatch):
    saved(LlamaConfig(**SMALL), tmp_path / "small")
    size = sum(p.nbytes for p in saved(LlamaConfig(**LARGE), tmp_path / "large").parameters())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, tmp_path), nprocs=2)
    for process in range(2):
        grown = torch.load(tmp_path / f"{process}.pt")
        assert grown["whole"] > size
        assert max(grown["fsdp"], grown["zero"]) < 0.75 * size, grown  # half of it, and one layer of sixteen
