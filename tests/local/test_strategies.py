"""Every strategy on two processes against one process: losses, weights, clipping, evaluation, checkpoints across strategies."""

import copy
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from packed_rows import write_rows
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM

from ray_jobs.core.errors import TrainingFailed
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.hidden_states import HiddenLoss, add_projection
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.on_policy import OnPolicyLoss
from ray_jobs.distillation.own_answers import Writing
from ray_jobs.distillation.student import build_student
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.batches import IGNORE, PackedRows
from ray_jobs.training.checkpoint import Checkpoint, TensorFiles
from ray_jobs.training.loop import train
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import Quantization, load_model
from ray_jobs.training.ranks import rank, sum_over_ranks
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.strategies import choose_strategy
from ray_jobs.training.strategies.base import trainable
from ray_jobs.training.strategies.loss_scale import LossScale

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13), (10,), (6, 10), (15,)]
MAX_NORM = 0.1
STEPS = 3
DDP = {"name": "ddp"}
FSDP = {"name": "fsdp"}
ZERO = [{"name": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)]
OFFLOADED = [
    {"name": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    {"name": "deepspeed", "zero_stage": 3, "offload": "parameters"},
]
POSTPONED = "-postponed"
"""Ending of a kind whose model is read part by part while it is cut."""
FULL = [FSDP, *ZERO, *OFFLOADED]
CASES = (
    [("full", strategy, {}, None) for strategy in FULL]
    + [(kind, strategy, {}, None) for kind in ("nf4", "distill") for strategy in (FSDP, ZERO[2])]
    + [("hidden", DDP, {}, None)]
    + [("own answers", strategy, {}, None) for strategy in (DDP, ZERO[1])]
    + [("lora", ZERO[1], {"gradient_checkpointing": True}, None)]
    + [("full", strategy, {"dtype": "float16"}, None) for strategy in (FSDP, ZERO[2])]
    + [(kind, strategy, {}, None) for kind in ("lora" + POSTPONED, "full" + POSTPONED) for strategy in (FSDP, ZERO[2])]
)
RESUMED = [
    ("full", FSDP, {}, ZERO[2]),
    ("full", ZERO[2], {}, FSDP),
    ("full", ZERO[1], {}, "alone"),
    ("full", DDP, {}, OFFLOADED[1]),
    ("full" + POSTPONED, ZERO[2], {}, FSDP),
]


def label(kind, strategy, changes, came_from):
    return "-".join(str(part) for part in (kind, strategy, changes, came_from)).translate({ord(c): None for c in "{}' :,"})


def parts_of(kind, folder):
    """Return (model, loss): equal in each process."""
    torch.manual_seed(0)
    quantization = Quantization() if kind == "nf4" else None
    model = load_model(folder, dtype=torch.float32, quantization=quantization, postponed=kind.endswith(POSTPONED))
    kind = kind.removesuffix(POSTPONED)
    if kind == "distill":
        loss = DistillLoss(WorkerTeacher(model), divergence=Divergence(temperature=2.0), kd_weight=0.9, ce_weight=0.1)
        return build_student(model, [0, 3]), loss
    if kind == "own answers":
        writing = Writing(4, 1.0, 24)
        return build_student(model, [0, 3]), OnPolicyLoss(WorkerTeacher(model), share=1.0, writing=writing, divergence=Divergence("jsd"))
    if kind == "hidden":  # every term at once, through a projection
        return hidden_parts(model)
    if kind != "full":
        model = add_lora(model, rank=4, alpha=8, dropout=0.0, targets="all-linear")
    return model, cross_entropy_loss


class PromptedRows(PackedRows):
    """Rows whose examples have three tokens of prompt."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return row._replace(labels=np.where(row.position_ids < 3, IGNORE, row.labels))


def hidden_parts(teacher):
    """Return a student of half the teacher's width and a loss of all terms, balanced."""
    config = copy.deepcopy(teacher.config)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.head_dim = 32, 2, 2, 16
    student = LlamaForCausalLM(config)
    add_projection(student, teacher.config.hidden_size, seed=0)
    hidden = HiddenLoss(0.5, "mse", student_layers=(0, 1))
    targets = WorkerTeacher(teacher, layers=(1, 3))
    return student, DistillLoss(targets, divergence=Divergence("jsd", temperature=2.0), ce_weight=0.1, hidden=hidden, balanced=True)


def run(kind, folder, rows, *, strategy, checkpoints, resume_from=None, **changes):
    model, loss = parts_of(kind, folder)
    open_rows = PromptedRows if kind == "own answers" else PackedRows
    recipe = Recipe(
        **{"max_steps": STEPS, "learning_rate": 1e-2, "global_batch_size": 3, "micro_batch_size": 1, "max_grad_norm": MAX_NORM}
        | {"dtype": "float32", "checkpoint_every_steps": 2}
        | changes
    )

    def on_checkpoint(step, save):
        place = checkpoints / f"step-{step}"
        if rank() == 0:
            place.mkdir(parents=True, exist_ok=True)
        save(place if rank() == 0 else None)

    squares = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: squares.append(square_of_gradients(optimizer)))
    progress = train(
        model,
        loss,
        open_rows(rows / "train"),
        eval_rows=open_rows(rows / "eval"),
        recipe=recipe,
        strategy=choose_strategy(**strategy),
        resume_from=resume_from,
        on_checkpoint=on_checkpoint,
    )
    hook.remove()
    return {
        "losses": [line["loss"] for line in progress.log if "loss" in line],
        "norms": [line["grad_norm"] for line in progress.log if "loss" in line],
        "evals": [progress.eval_before["loss"], progress.eval_after["loss"]],
        "clipped": (sum(squares) / STEPS) ** 0.5,
        "weights": {name: parameter.detach().clone() for name, parameter in trainable(model).items()} if rank() == 0 else {},
    }


def square_of_gradients(optimizer):
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return sum(float((g.to_local() if isinstance(g, DTensor) else g).square().sum()) for g in gradients)


def _worker(process, port, tiny_model, folder):
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=2)
    torch.set_num_threads(1)
    for case in CASES + RESUMED:
        kind, strategy, changes, came_from = case
        source = None if came_from is None else folder / "checkpoints" / name_of_source(kind, came_from) / "step-2"
        result = run(
            kind, tiny_model, folder, strategy=strategy, checkpoints=folder / "checkpoints" / label(*case), resume_from=source, **changes
        )
        squares = sum_over_ranks([result["clipped"] ** 2])
        if process == 0:
            torch.save(result | {"clipped": squares[0] ** 0.5}, folder / f"{label(*case)}.pt")
    dist.destroy_process_group()


def name_of_source(kind, came_from):
    return came_from if came_from == "alone" else label(kind, came_from, {}, None)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """Everything that one pair of processes did: results by case, and checkpoints."""
    folder = tmp_path_factory.mktemp("strategies")
    write_rows(folder / "train", SEGMENTS)
    write_rows(folder / "eval", SEGMENTS[:3])
    torch.save(run("full", tiny_model, folder, strategy=DDP, checkpoints=folder / "checkpoints" / "alone"), folder / "full.pt")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, tiny_model, folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_model, folder):
    """A function that returns what one process comes to."""
    known = {}

    def result(kind, changes):
        kind = kind.removesuffix(POSTPONED)
        key = label(kind, changes, None, None)
        if key not in known:
            known[key] = run(kind, tiny_model, folder, strategy=DDP, checkpoints=folder / "unused" / key, **changes)
        return known[key]

    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: label(*case))
def test_two_workers_run_like_one(folder, alone, case):
    kind, _, changes, _ = case
    result, expected = torch.load(folder / f"{label(*case)}.pt"), alone(kind, changes)
    tolerance = {"rel": 1e-3} if "dtype" in changes else {"rel": 2e-5}
    assert result["losses"] == pytest.approx(expected["losses"], **tolerance)
    assert result["evals"] == pytest.approx(expected["evals"], **tolerance)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-2 if "dtype" in changes else 1e-3)
    assert result["weights"].keys() == expected["weights"].keys()
    for name, weight in result["weights"].items():
        # AdamW makes full steps of tiny gradients, so another order of summation shows: a part of the 3 steps of 1e-2
        torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-3, atol=2e-2 if "dtype" in changes else 2e-3)


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case[2] and case[0] not in ("hidden", "own answers")], ids=lambda case: label(*case)
)
def test_gradients_are_clipped_to_the_norm_over_all_workers(folder, case):
    result = torch.load(folder / f"{label(*case)}.pt")
    assert min(result["norms"]) > MAX_NORM
    copies = 2 if case[1] == DDP else 1
    assert result["clipped"] / copies**0.5 == pytest.approx(MAX_NORM, rel=1e-3)


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: label(*case))
def test_a_checkpoint_goes_on_under_another_strategy_and_number_of_workers(folder, alone, case):
    result, expected = torch.load(folder / f"{label(*case)}.pt"), alone(case[0], {})
    assert result["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert result["evals"] == pytest.approx(expected["evals"], rel=2e-5)


@pytest.mark.parametrize("strategy", [FSDP, ZERO[2], OFFLOADED[0]], ids=str)
def test_one_process_goes_on_from_what_two_left(tiny_model, folder, alone, strategy):
    left = folder / "checkpoints" / label("full", strategy, {}, None) / "step-2"
    result = run("full", tiny_model, folder, strategy=DDP, checkpoints=folder / "unused", resume_from=left)
    assert result["losses"] == pytest.approx(alone("full", {})["losses"], rel=2e-5)


def test_checkpoints_hold_the_same_whatever_wrote_them(folder):
    expected = Checkpoint(folder / "checkpoints" / "alone" / "step-2").optimizer_state()
    for strategy in FULL:
        states = Checkpoint(folder / "checkpoints" / label("full", strategy, {}, None) / "step-2").optimizer_state()
        assert states.keys() == expected.keys()
        for name, state in states.items():
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert float(state["step"]) == 2
            torch.testing.assert_close(state["exp_avg"], expected[name]["exp_avg"], rtol=1e-2, atol=1e-6)


def test_nothing_is_compiled(folder):
    assert not (folder / "compiled").exists()


def test_a_torn_checkpoint_is_refused_with_what_to_do(folder, tmp_path):
    whole = folder / "checkpoints" / "alone" / "step-2"
    for torn in ("trainable-00001.safetensors", "optimizer-00001.safetensors", "progress.json"):
        copy = tmp_path / torn
        copy.mkdir()
        for file in whole.iterdir():
            data = file.read_bytes()
            (copy / file.name).write_bytes(data[: len(data) // 2] if file.name == torn else data)
        with pytest.raises(TrainingFailed, match=r"is not whole .* or use --force"):
            Checkpoint(copy)
    (tmp_path / "progress.json" / "progress.json").unlink()
    with pytest.raises(TrainingFailed, match=r"is not whole"):
        Checkpoint(tmp_path / "progress.json")


def test_files_are_of_bounded_size(tmp_path):
    files = TensorFiles(tmp_path, "trainable", file_bytes=100)
    for index in range(5):
        files.add(str(index), torch.full((10,), float(index)))  # 40 bytes
    files.flush()
    assert files.names == ["trainable-00001.safetensors", "trainable-00002.safetensors"]
    assert all((tmp_path / name).stat().st_size < 400 for name in files.names)


def test_the_loss_scale_follows_torchs_rule():
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu", init_scale=65536.0)
    assert ours.state_dict() == theirs.state_dict()
    ours.load_state_dict({**theirs.state_dict(), "growth_interval": 2})
    seen = []
    for overflow in (False, False, True, False, False):
        ours.update(overflow=overflow)
        seen.append(ours.value / 65536.0)
    assert seen == [1.0, 2.0, 1.0, 1.0, 2.0]
