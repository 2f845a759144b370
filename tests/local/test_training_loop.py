"""The training loop in one process, and in two with torch.distributed, on a tiny model."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from packed_rows import write_rows
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ray_jobs.core.errors import DataError, TrainingFailed
from ray_jobs.training.adapters import add_lora
from ray_jobs.training.batches import IGNORE, Batch, PackedRows, collate
from ray_jobs.training.checkpoint import trainable
from ray_jobs.training.loop import evaluate, train
from ray_jobs.training.losses import LossSums, cross_entropy_loss, valid_hidden
from ray_jobs.training.models import Quantization, load_model
from ray_jobs.training.recipe import Recipe

SEGMENTS = [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13), (10,), (6, 10), (15,)]
BASE = {"max_steps": 6, "learning_rate": 1e-2, "global_batch_size": 4, "dtype": "float32", "checkpoint_every_steps": 2}


def recipe(**changes):
    return Recipe(**(BASE | changes))


def adapted(folder, *, dropout=0.0, **options):
    torch.manual_seed(0)
    model = load_model(folder, dtype=options.pop("dtype", torch.float32), **options)
    return add_lora(model, rank=4, alpha=8, dropout=dropout, targets="all-linear")


@pytest.fixture
def folders(tmp_path):
    return write_rows(tmp_path / "train", SEGMENTS), write_rows(tmp_path / "eval", SEGMENTS[:3])


@pytest.fixture
def rows(folders):
    return PackedRows(folders[0]), PackedRows(folders[1])


def run(model, rows, **options):
    return train(model, cross_entropy_loss, rows[0], eval_rows=rows[1], recipe=options.pop("recipe", recipe()), **options)


def losses(progress):
    return [line["loss"] for line in progress.log if "loss" in line]


def assert_same_weights(one, other, **tolerance):
    for name, parameter in trainable(one).items():
        torch.testing.assert_close(parameter, trainable(other)[name], **tolerance)


def test_the_loss_is_the_models_own_mean_cross_entropy(tiny_model, rows):
    model = load_model(tiny_model, dtype=torch.float32)
    row = rows[0][3]
    ids, labels = torch.tensor(row.input_ids)[None].long(), torch.tensor(row.labels)[None].long()
    sums = cross_entropy_loss(model, collate([row]))
    assert float(sums.total / 15) == pytest.approx(float(model(input_ids=ids, labels=labels).loss), rel=1e-5)
    assert set(sums.terms) == {"cross_entropy"}


def test_a_batch_without_labels_has_no_loss_and_no_gradient(tiny_model, rows):
    model = adapted(tiny_model)
    row = rows[0][0]
    sums = cross_entropy_loss(model, collate([row._replace(labels=row.labels * 0 + IGNORE)]))
    sums.total.backward()
    assert float(sums.total) == 0
    assert all(not p.grad.any() for p in trainable(model).values() if p.grad is not None)


@pytest.mark.parametrize("training", [True, False])
def test_packed_examples_do_not_see_each_other(tiny_model, rows, training):
    model = load_model(tiny_model, dtype=torch.float32).train(training)
    packed, _ = valid_hidden(model, collate([rows[0][2], rows[0][0]]))
    alone = [valid_hidden(model, part)[0] for row in (rows[0][2], rows[0][0]) for part in examples(row)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_packed_examples_have_the_loss_and_the_gradient_of_padded_ones(tiny_model, rows):
    packed, padded = adapted(tiny_model), adapted(tiny_model)
    one = collate([rows[0][2], rows[0][4]])
    apart = [part for row in (rows[0][2], rows[0][4]) for part in examples(row)]
    width = max(part.input_ids_BT.shape[1] for part in apart)
    many = Batch(*(torch.cat([_padded(getattr(part, name), width, fill) for part in apart]) for name, fill in FILLS.items()))
    sums = [cross_entropy_loss(model, batch) for model, batch in ((packed, one), (padded, many))]
    for loss in sums:
        loss.total.backward()
    assert float(sums[0].total) == pytest.approx(float(sums[1].total), rel=1e-5)
    for name, parameter in trainable(packed).items():
        torch.testing.assert_close(parameter.grad, trainable(padded)[name].grad, rtol=1e-3, atol=1e-5)


FILLS = {"input_ids_BT": 0, "position_ids_BT": None, "labels_BT": IGNORE}


def _padded(values_1T, width, fill):
    missing = width - values_1T.shape[1]
    tail = torch.arange(missing) if fill is None else torch.full((missing,), fill)
    return torch.cat([values_1T, tail[None]], dim=1)


def examples(row):
    starts = [i for i, position in enumerate(row.position_ids) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
        cut = [torch.tensor(values[start:end])[None].long() for values in (row.input_ids, row.position_ids, row.labels)]
        yield Batch(*cut)


def test_training_lowers_the_held_out_loss_and_logs_every_step(tiny_model, rows):
    progress = run(adapted(tiny_model), rows, recipe=recipe(max_steps=12, eval_every_steps=6))
    assert progress.eval_after["loss"] < progress.eval_before["loss"] - 0.1
    assert [line["step"] for line in progress.log if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in progress.log if "eval_loss" in line] == [0, 6, 12]
    line = next(line for line in progress.log if "loss" in line)
    assert {"step", "loss", "terms", "learning_rate", "tokens", "tokens_per_s", "grad_norm"} <= line.keys()
    assert progress.tokens == sum(line["tokens"] - before for line, before in zip(steps(progress), [0, *tokens(progress)], strict=False))
    assert json.loads(json.dumps(progress.log)) == progress.log


def steps(progress):
    return [line for line in progress.log if "loss" in line]


def tokens(progress):
    return [line["tokens"] for line in steps(progress)]


def test_evaluation_before_the_first_step_is_the_base_models(tiny_model, rows):
    progress = run(adapted(tiny_model), rows)
    base = evaluate(load_model(tiny_model, dtype=torch.float32), cross_entropy_loss, rows[1])
    assert progress.eval_before["loss"] == pytest.approx(base["loss"], rel=1e-6)
    assert base["label_tokens"] == sum(n - 1 for lengths in SEGMENTS[:3] for n in lengths)


def test_evaluation_leaves_the_mode_and_the_gradients_alone(tiny_model, rows):
    model = adapted(tiny_model).train()
    evaluate(model, cross_entropy_loss, rows[1])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_accumulation_does_not_change_the_run(tiny_model, rows, micro_batch_size):
    whole, split = adapted(tiny_model), adapted(tiny_model)
    reference = run(whole, rows, recipe=recipe(micro_batch_size=4))
    progress = run(split, rows, recipe=recipe(micro_batch_size=micro_batch_size))
    assert losses(progress) == pytest.approx(losses(reference), rel=1e-5)
    assert_same_weights(split, whole, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_does_not_change_the_run(tiny_model, rows):
    reference = run(adapted(tiny_model), rows)
    progress = run(adapted(tiny_model), rows, recipe=recipe(gradient_checkpointing=True))
    assert losses(progress) == pytest.approx(losses(reference), rel=1e-5)


def test_the_log_window_is_the_mean_over_its_tokens(tiny_model, rows):
    each = [line for line in run(adapted(tiny_model), rows, recipe=recipe(max_steps=5)).log if "loss" in line]
    pairs = [line for line in run(adapted(tiny_model), rows, recipe=recipe(max_steps=5, log_every_steps=2)).log if "loss" in line]
    assert [line["step"] for line in pairs] == [2, 4, 5]
    assert min(e["loss"] for e in each[:2]) <= pairs[0]["loss"] <= max(e["loss"] for e in each[:2])
    assert pairs[2]["loss"] == pytest.approx(each[4]["loss"])


class Killed(Exception):
    """Stands for a process that ends at once."""


def keep_checkpoints(folder, *, die_at=None):
    def on_checkpoint(step, save):
        place = folder / f"step-{step}"
        place.mkdir(parents=True, exist_ok=True)
        save(place)
        if step == die_at:
            raise Killed

    return on_checkpoint


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_ends_in_the_very_same_weights_and_log(tiny_model, rows, tmp_path, dropout):
    undisturbed = adapted(tiny_model, dropout=dropout)
    reference = run(undisturbed, rows, recipe=recipe(eval_every_steps=3))
    with pytest.raises(Killed):
        run(
            adapted(tiny_model, dropout=dropout),
            rows,
            recipe=recipe(eval_every_steps=3),
            on_checkpoint=keep_checkpoints(tmp_path, die_at=4),
        )
    assert {file.name for file in (tmp_path / "step-4").iterdir()} == {
        "trainable-00001.safetensors",
        "optimizer-00001.safetensors",
        "progress.json",
    }
    resumed = adapted(tiny_model, dropout=dropout)
    progress = run(resumed, rows, recipe=recipe(eval_every_steps=3), resume_from=tmp_path / "step-4")
    assert_same_weights(resumed, undisturbed, rtol=0, atol=0)
    assert losses(progress) == losses(reference)
    assert [line["step"] for line in progress.log] == [line["step"] for line in reference.log]
    assert progress.eval_before == reference.eval_before
    assert progress.eval_after == reference.eval_after
    assert progress.tokens == reference.tokens


def test_a_finished_run_resumes_to_nothing(tiny_model, rows, tmp_path):
    model = adapted(tiny_model)
    reference = run(model, rows, on_checkpoint=keep_checkpoints(tmp_path))
    again = adapted(tiny_model)
    assert run(again, rows, resume_from=tmp_path / "step-6").log == reference.log
    assert_same_weights(again, model, rtol=0, atol=0)


def test_a_checkpoint_of_another_model_is_refused(tiny_model, rows, tmp_path):
    run(adapted(tiny_model), rows, on_checkpoint=keep_checkpoints(tmp_path))
    other = add_lora(load_model(tiny_model, dtype=torch.float32), rank=4, alpha=8, dropout=0.0, targets=["q_proj"])
    with pytest.raises(TrainingFailed, match="of another model"):
        run(other, rows, resume_from=tmp_path / "step-6")


def test_a_loss_that_is_not_a_number_stops_with_the_step(tiny_model, rows):
    def broken(model, batch):
        sums = cross_entropy_loss(model, batch)
        return LossSums(sums.total * float("nan"), sums.terms)

    with pytest.raises(TrainingFailed, match="the loss is nan at step 1"):
        train(adapted(tiny_model), broken, rows[0], eval_rows=None, recipe=recipe())


def test_a_loss_that_is_not_a_number_names_the_packed_rows_of_its_micro_batches(tiny_model, rows):
    def broken(model, batch):
        sums = cross_entropy_loss(model, batch)
        return LossSums(sums.total * (float("nan") if 3000 in batch.input_ids_BT else 1.0), sums.terms)  # row 3 starts with token 3000

    every = recipe(global_batch_size=len(rows[0]), micro_batch_size=1)
    with pytest.raises(TrainingFailed, match=r"the loss is nan at step 1, from packed rows \[3\]: lower learning_rate"):
        train(adapted(tiny_model), broken, rows[0], eval_rows=None, recipe=every)


def test_a_step_in_which_no_token_has_a_label_is_refused_with_its_rows(tiny_model, tmp_path):
    nothing = PackedRows(write_rows(tmp_path / "nothing", [(1,) * 8] * 2))
    with pytest.raises(DataError, match=r"no token of step 1 has a label: its packed rows \[0, 1\] teach nothing"):
        train(adapted(tiny_model), cross_entropy_loss, nothing, eval_rows=None, recipe=recipe(global_batch_size=2))


def test_gradients_are_clipped_to_the_norm(tiny_model, rows):
    model = adapted(tiny_model)
    norms = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: norms.append(norm_of(optimizer)))
    progress = run(model, rows, recipe=recipe(max_steps=1, max_grad_norm=1e-3))
    hook.remove()
    assert next(line for line in progress.log if "loss" in line)["grad_norm"] > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def norm_of(optimizer):
    gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(torch.stack(gradients).norm())


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_bfloat16_products_keep_float32_weights_and_learn(tiny_model, rows, method):
    if method == "full":
        model = load_model(tiny_model, dtype=torch.float32)
    else:
        model = adapted(tiny_model, dtype=torch.bfloat16, quantization=Quantization() if method == "qlora" else None)
    progress = run(model, rows, recipe=recipe(dtype="bfloat16", max_steps=12))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert progress.eval_after["loss"] < progress.eval_before["loss"] - 0.1


def _worker(rank, port, tiny_model, train_folder, eval_folder, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = adapted(tiny_model)
    progress = run(model, (PackedRows(train_folder), PackedRows(eval_folder)), recipe=recipe(global_batch_size=3, micro_batch_size=1))
    torch.save(
        {"losses": losses(progress), "evals": progress.eval_after, "tokens": progress.tokens, "weights": trainable(model)},
        out / f"{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_workers_run_like_one(tiny_model, folders, rows, tmp_path, free_port):
    single = adapted(tiny_model)
    reference = run(single, rows, recipe=recipe(global_batch_size=3, micro_batch_size=1))
    torch.multiprocessing.spawn(_worker, (free_port, tiny_model, *folders, tmp_path), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for result in results:
        assert result["losses"] == pytest.approx(losses(reference), rel=1e-5)
        assert result["evals"]["loss"] == pytest.approx(reference.eval_after["loss"], rel=1e-5)
        assert result["tokens"] == reference.tokens
        for name, parameter in trainable(single).items():
            # AdamW makes full steps of tiny gradients, so another order of summation shows: 1% of a step of 1e-2
            torch.testing.assert_close(result["weights"][name], parameter, rtol=1e-3, atol=1e-4)
