"""What a training run tells while it works, in one process and in two."""

import json
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from packed_rows import write_rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_jobs.training.adapters import add_lora
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.loop import train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.metrics import in_words
from ray_jobs.training.models import load_model
from ray_jobs.training.ranks import gather
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.timing import CommunicationProbe

STEPS = 3


def run(tiny_model, folder):
    torch.manual_seed(0)
    model = add_lora(load_model(tiny_model, dtype=torch.float32), rank=4, alpha=8, dropout=0.0, targets="all-linear")
    recipe = Recipe(max_steps=STEPS, global_batch_size=4, micro_batch_size=1, dtype="float32")
    return train(model, cross_entropy_loss, PackedRows(folder), eval_rows=None, recipe=recipe).log


@pytest.fixture
def folder(tmp_path):
    return write_rows(tmp_path / "train", [(16,)] * 8)


def test_a_line_says_where_the_time_went_and_what_is_left(tiny_model, folder):
    lines = run(tiny_model, folder)
    assert json.loads(json.dumps(lines)) == lines
    for line in lines:
        parts = dict(line["shares"])
        assert parts.pop("communication") == 0.0
        assert set(parts) == {"data", "forward", "backward", "optimizer", "other"}
        assert sum(parts.values()) == pytest.approx(1, abs=1e-3)
        assert parts["forward"] > 0 and parts["backward"] > 0
        assert line["tokens_per_s_per_worker"] == line["tokens_per_s"]
        assert len(line["host_peak_bytes"]) == len(line["gpu_peak_bytes"]) == 1
        assert line["host_peak_bytes"][0] > 10 * 2**20
    assert [line["eta_s"] for line in lines][-1] == 0.0
    assert "backward" in in_words(lines[-1]) and "tokens/s a worker" in in_words(lines[-1])


def _worker(rank, port, tiny_model, folder, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    lines = run(tiny_model, folder)
    waited = gather(_share_of_waiting(rank))
    if rank == 0:
        (out / "found.json").write_text(json.dumps({"lines": lines, "waited": waited}))
    dist.destroy_process_group()


def _share_of_waiting(rank):
    """Rank 1 comes a second late to the reduction, so rank 0 spends nearly all of its step in it."""
    model = DistributedDataParallel(nn.Linear(8, 8))
    probe = CommunicationProbe(world_size=2, first_step=0)
    for step in range(2):
        with probe(step):
            time.sleep(rank)
            model(torch.ones(2, 8)).sum().backward()
    return probe.share


def test_two_workers_report_both_peaks_and_their_communication(tiny_model, folder, tmp_path, free_port):
    torch.multiprocessing.spawn(_worker, (free_port, tiny_model, folder, tmp_path), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    lines = found["lines"]
    assert all(len(line["host_peak_bytes"]) == 2 for line in lines)
    assert all(line["tokens_per_s_per_worker"] == pytest.approx(line["tokens_per_s"] / 2) for line in lines)
    assert lines[0]["shares"]["communication"] == 0.0  # the second step is the first that is profiled
    assert all(0 < line["shares"]["communication"] < 1 for line in lines[1:])
    assert found["waited"][0] > 0.8 > 0.2 > found["waited"][1]
