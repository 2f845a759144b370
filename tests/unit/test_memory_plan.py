"""The memory plan: figures that are known of well-known models, and the table that `raystill plan` prints."""

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, Qwen3Config

from benchmarks import plan_tables
from ray_jobs import distill, plan
from ray_jobs.core.config_file import load_config
from ray_jobs.core.errors import ConfigError, ModelError
from ray_jobs.distillation.plan import cache_plan
from ray_jobs.distillation.topk import TopKCodec
from ray_jobs.training.activations import simulate
from ray_jobs.training.alternatives import Limits, obstacle, over_workers, smallest_change
from ray_jobs.training.architecture import find_architecture
from ray_jobs.training.fit_check import against_measured, check_fits
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.largest import largest_batch, largest_length
from ray_jobs.training.losses import CHUNK_POSITIONS, head_cross_entropy
from ray_jobs.training.memory_plan import Lora, Request, Work, optimizer_bytes, plan_base, predict
from ray_jobs.training.models import Quantization, load_model
from ray_jobs.training.plan_table import workers_table
from ray_jobs.training.recipe import Recipe
from ray_jobs.training.run_estimate import Rate, estimate, measured_rate
from ray_jobs.training.sharding_plan import Sharding
from ray_jobs.training.skeletons import constants_bytes, num_linear, num_parameters, skeleton_of, weight_bytes
from ray_jobs.training.teaching_plan import Teaching

CONFIGS = Path(__file__).parents[2] / "ray_jobs" / "configs"
LLAMA_2, LLAMA_3 = (find_architecture(name).settings for name in ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B"))
SMALL = LLAMA_2 | {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL |= {"num_hidden_layers": 4}
WORK = Work(batch_size=1, length=64, dtype=torch.float16, checkpointing=True, device="cuda")
ON_CPU = WORK._replace(dtype=torch.bfloat16, device="cpu", checkpointing=False)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("settings", "dtype", "gigabytes"),
    [(LLAMA_2, torch.float32, 26.95), (LLAMA_2, torch.float16, 13.48), (LLAMA_3, torch.float32, 32.12)],
)
def test_weights_of_known_models(settings, dtype, gigabytes):
    assert plan_base(settings, dtype=dtype).weights / 1e9 == pytest.approx(gigabytes, abs=0.005)


@pytest.mark.parametrize(
    ("quantization", "weights", "constants"),
    [
        (Quantization("int8", double_quantization=False), 9.08, 0.006),
        (Quantization("nf4", double_quantization=False), 5.59, 0.436),
        (Quantization("nf4", double_quantization=True), 5.59, 0.111),
    ],
)
def test_quantized_llama_3_with_16_bit_embeddings_and_head(quantization, weights, constants):
    stored = weight_bytes(skeleton_of(LLAMA_3), dtype=torch.bfloat16, quantization=quantization)
    assert stored.weights / 1e9 == pytest.approx(weights, abs=0.005)
    assert stored.constants / 1e9 == pytest.approx(constants, abs=0.001)


@pytest.mark.parametrize(("double", "bits"), [(False, 0.5), (True, 0.127)])
def test_quantization_constants_in_bits_a_weight(double, bits):
    assert constants_bytes(10**9, Quantization(double_quantization=double)) * 8 / 10**9 == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_4_bit_storage_in_bits_a_parameter(double, bits):
    quantization = Quantization(double_quantization=double)
    linear = num_linear(skeleton_of(LLAMA_3))
    assert (linear / 2 + constants_bytes(linear, quantization)) * 8 / linear == pytest.approx(bits, abs=5e-4)


def test_plan_of_qlora_on_llama_3_as_a_whole():
    memory = predict(Request(LLAMA_3, "qlora", WORK, Lora(32, ATTENTION)))
    assert memory.weights / 1e9 == pytest.approx(5.59, abs=0.005)
    assert memory.adapter / 1e6 == pytest.approx(109.1, abs=0.05)
    assert (memory.gradients, memory.optimizer) == (memory.adapter, 2 * memory.adapter)
    assert memory.total == sum(memory.parts.values())
    assert memory.host_total == memory.host_overhead > 0
    assert list(memory.parts.values()) == sorted(memory.parts.values(), reverse=True)


def test_constants_equal_what_bitsandbytes_keeps(tmp_path):
    settings = SMALL | {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    real = skeleton_of(settings).to_empty(device="cpu")
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    real.save_pretrained(tmp_path)
    for double in (False, True):
        kept = stored = 0
        model = load_model(tmp_path, dtype=torch.float32, quantization=Quantization(double_quantization=double))
        for weight in (p for p in model.parameters() if hasattr(p, "quant_state")):
            stored += weight.numel() * weight.element_size()
            state = weight.quant_state
            kept += state.absmax.numel() * state.absmax.element_size() + (state.state2.absmax.numel() * 4 if double else 0)
        linear = num_linear(skeleton_of(settings))
        assert stored == linear // 2
        assert kept == pytest.approx(constants_bytes(linear, Quantization(double_quantization=double)), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_equal_what_autograd_saves_on_real_tensors(dtype):
    settings = SMALL | {"num_hidden_layers": 5}
    model = skeleton_of(settings).to_empty(device="cpu").train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids, mask = torch.zeros(2, 64, dtype=torch.long), torch.ones(2, 1, 64, 64, dtype=torch.bool).tril()
    precision = torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), precision:
        model.get_decoder()(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    options = {"num_layers": 5, "batch_size": 2, "length": 64, "dtype": dtype, "checkpointing": False}
    counted = simulate(lambda layers: skeleton_of(settings, num_layers=layers), **options)
    assert counted.saved == pytest.approx(sum(size for size, _ in saved.values()), rel=0.05)


def test_a_straight_line_over_layers_meets_the_whole_model():
    def build(layers):
        return skeleton_of(SMALL, num_layers=layers)

    options = {"batch_size": 2, "length": 64, "dtype": torch.bfloat16, "checkpointing": False}
    short, whole = simulate(build, num_layers=9, **options), simulate(lambda _: build(9), num_layers=2, **options)
    assert short.saved == pytest.approx(whole.saved, rel=0.01)
    assert short.peak == pytest.approx(whole.peak, rel=0.01)


def test_checkpointing_length_and_batch_move_activations_as_they_should():
    def activations(batch_size=1, length=64, checkpointing=False):
        work = Work(batch_size, length, torch.float16, checkpointing)
        return predict(Request(SMALL | {"num_hidden_layers": 24}, "lora", work, Lora(2))).activations

    assert activations(checkpointing=True) < activations() / 5
    assert activations(batch_size=4) == pytest.approx(4 * activations(), rel=0.15)
    assert activations(length=256) > 4 * activations(length=64) * 0.85


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_planned_are_what_the_loss_allocates(dtype):
    settings = SMALL | {"vocab_size": 4096, "num_hidden_layers": 2}
    work = Work(batch_size=4, length=CHUNK_POSITIONS, dtype=dtype, checkpointing=False)
    planned = predict(Request(settings, "lora", work, Lora(2))).logits
    hidden = torch.randn(work.batch_size * (work.length - 1), 32, dtype=dtype, requires_grad=True)
    head, labels = torch.randn(4096, 32, dtype=dtype), torch.zeros(len(hidden), dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        head_cross_entropy(hidden, head, None, labels)
    found = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))
    assert max(alive) == pytest.approx(planned, rel=0.05)


def test_optimizers_in_bytes():
    assert optimizer_bytes([10_000, 100], "adamw") == 8 * 10_100
    assert optimizer_bytes([10_000, 100], "adamw_8bit") == 2 * (10_000 + 40 * 4) + 8 * 100
    plain = Request(SMALL, "full", WORK)
    paged = predict(plain._replace(optimizer="paged_adamw_8bit"))
    assert paged.optimizer == 0 < paged.offloaded


def test_several_whole_copies_exchange_buckets_of_gradients():
    alone, two = (predict(Request(SMALL, "lora", ON_CPU, Lora(2), sharding=Sharding("ddp", workers))) for workers in (1, 2))
    assert two.total - alone.total == two.buckets == two.gradients


@pytest.mark.parametrize(
    ("sharding", "divided"),
    [
        (Sharding("deepspeed", zero_stage=1), {"optimizer"}),
        (Sharding("deepspeed", zero_stage=2), {"optimizer", "gradients"}),
        (Sharding("deepspeed", zero_stage=3), {"optimizer", "gradients", "weights"}),
        (Sharding("fsdp"), {"optimizer", "gradients", "weights"}),
    ],
)
def test_strategies_divide_what_they_shard(sharding, divided):
    two, eight = (predict(Request(SMALL, "full", ON_CPU, sharding=sharding._replace(workers=workers))) for workers in (2, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(two, part) == pytest.approx(getattr(eight, part) * (4 if part in divided else 1), rel=0.001)
    assert two.activations == eight.activations
    assert bool(two.gathered) == sharding.cuts_parameters


def test_offload_moves_state_to_the_host_of_a_gpu():
    plain = Request(SMALL, "full", WORK, sharding=Sharding("deepspeed", 2, 3, "none"))
    here, optimizer, parameters = (
        predict(plain._replace(sharding=plain.sharding._replace(offload=offload))) for offload in ("none", "optimizer", "parameters")
    )
    assert here.offloaded == 0
    assert optimizer.offloaded == here.optimizer + here.gradients
    assert parameters.offloaded == optimizer.offloaded + here.weights
    assert here.total + here.host_total == parameters.total + parameters.host_total


def test_the_largest_batch_and_length_fit_and_one_more_does_not():
    request = Request(SMALL, "lora", ON_CPU, Lora(2))

    def between(**sizes):
        fits, more = (
            predict(request._replace(work=ON_CPU._replace(**{name: pair[i] for name, pair in sizes.items()}))).total for i in (0, 1)
        )
        return (fits + more) // 2

    assert largest_batch(request, between(batch_size=(37, 38))) == 37
    assert largest_length(request, between(length=(640, 704))) == 640
    assert largest_batch(request, 1000) == largest_length(request, 1000) == 0


def test_smallest_change_tries_time_first_and_machines_last():
    request = Request(SMALL, "lora", ON_CPU._replace(batch_size=8, length=512), Lora(2))
    now = predict(request)

    def change(needed, request=request):
        return smallest_change(request, Limits(needed, needed))

    recomputed = request._replace(work=request.work._replace(checkpointing=True))
    assert change(predict(recomputed).total) == "set finetune.gradient_checkpointing = true"
    assert change(now.total - 1000, recomputed) != change(now.total - 1000)
    less = predict(recomputed._replace(work=recomputed.work._replace(batch_size=2))).total
    assert change(less, recomputed) == "set finetune.micro_batch_size = 2"
    assert "take a smaller model" in change(1000)


def test_a_job_that_fits_is_told_what_would_need_less():
    request = Request(SMALL, "lora", ON_CPU._replace(batch_size=64, length=512), Lora(2))
    plan = check_fits(request, Limits(10**12, 10**12))
    assert isinstance(plan, JobPlan)
    assert plan.fits
    assert plan.smallest_change == "set finetune.gradient_checkpointing = true"
    assert plan.total == sum(plan.parts.values())


def test_what_cannot_fit_is_refused_in_one_line_with_the_table_above(capsys):
    with pytest.raises(ConfigError, match=r"LoRA r=2, bfloat16 needs .* gives .*: give \[workers\] memory at least") as caught:
        check_fits(Request(SMALL, "lora", ON_CPU, Lora(2)), Limits(1000, 1000))
    assert "\n" not in str(caught.value)
    assert "GB per worker" in capsys.readouterr().err


def test_shards_of_a_model_that_no_worker_can_read_whole_are_refused():
    request = Request(LLAMA_3, "lora", WORK, Lora(2, dora=True), sharding=Sharding("fsdp", 16))
    limit = predict(request).total + 10**6
    assert limit < plan_base(LLAMA_3, dtype=torch.float16).weights
    with pytest.raises(ConfigError, match=r"cannot start: each worker reads the whole model, 14.96 GiB .* before FSDP cuts it"):
        check_fits(request, Limits(limit, limit))
    assert not obstacle(request, Limits(17 * 10**9, 0))
    assert not obstacle(request._replace(sharding=Sharding("deepspeed", 16, 2)), Limits(limit, limit))
    assert not obstacle(request._replace(lora=Lora(2)), Limits(limit, limit))  # read in pieces


def test_no_change_is_named_that_would_be_refused():
    request = Request(SMALL, "full", ON_CPU, optimizer="adamw_8bit")
    assert "cannot work with optimizer" in obstacle(request._replace(sharding=Sharding("fsdp", 2)), Limits(10**12, 10**12))
    limit = predict(request._replace(work=ON_CPU._replace(checkpointing=True), sharding=Sharding("fsdp", 64))).total
    assert "fsdp" not in smallest_change(request._replace(work=ON_CPU._replace(checkpointing=True)), Limits(limit, limit))


def test_strategies_are_tried_with_more_workers_until_one_fits():
    request = Request(SMALL | {"vocab_size": 32000, "num_hidden_layers": 64}, "full", ON_CPU)
    limit = predict(request._replace(sharding=Sharding("deepspeed", 8, 3))).total
    rows = {row.sharding: row.memories for row in over_workers(request, Limits(limit, limit))}
    assert len(rows[Sharding("deepspeed", zero_stage=3)]) == 4  # 1, 2, 4, 8
    assert rows[Sharding("deepspeed", zero_stage=3)][-1].total <= limit


def test_a_strategy_that_cannot_start_is_named_with_its_reason_instead_of_a_size():
    request = Request(SMALL, "qlora", ON_CPU, Lora(2), quantization=Quantization("int8"))
    limits = Limits(10**12, 10**12)
    rows = over_workers(request, limits)
    refused = [row for row in rows if row.obstacle]
    assert refused
    assert len(refused) < len(rows)
    assert all(bool(row.memories) == (row not in refused) for row in rows)
    assert f"cannot start: {refused[0].obstacle}" in "\n".join(workers_table("full", rows, limits))


def test_steps_tokens_time_and_disk():
    request = Request(SMALL, "lora", ON_CPU, Lora(2))
    numbers = predict(request).adapter // 4
    options = {"keep_checkpoints": 2, "export_dtype_bytes": 4}
    known = estimate(request, Recipe(epochs=2, global_batch_size=4), num_rows=40, rate=Rate(64.0, "as given"), **options)
    assert (known.steps, known.tokens, known.seconds) == (20, 20 * 4 * 64, 80.0)
    assert (known.checkpoint_bytes, known.disk_bytes) == (12 * numbers, 3 * 12 * numbers + 4 * numbers)
    unknown = estimate(request, Recipe(), num_rows=None, rate=None, **options)
    assert (unknown.steps, unknown.tokens, unknown.seconds) == (None, None, None)
    assert "rate unknown: give tokens_per_s" in unknown.lines[0]
    assert measured_rate({"train_seconds": 10.0, "counts": {"tokens": 4000}}, workers=2).tokens_per_s == 200
    assert measured_rate(None, workers=1) is None


def test_prediction_beside_the_peak():
    plan = JobPlan({"weights": 2**30}, 2**30, 3 * 2**29, "", 2**30, 3 * 2**29)
    peaks = {"peak_bytes": [2**29, 2**31], "gpu_peak_bytes": [0, 0]}
    found = against_measured(plan, peaks)
    assert (found["predicted_bytes"], found["measured_bytes"], found["error"]) == (2**30, 2**31, -0.5)
    assert found["line"] == "memory: predicted 1.00 GiB, measured 2.00 GiB (-50%)"
    roomy = plan._replace(limit=2**34, host_limit=2**34)
    assert against_measured(roomy, peaks)["line"].endswith("(-50%, freed memory kept for speed)")
    assert against_measured(None, {}) == {}


def test_a_gpu_worker_is_held_to_the_gpus_memory(tiny_config):
    cramped = plan.run(tiny_config(workers__gpus=1, workers__memory="900GiB", workers__gpu_memory="1MiB"), force=False)
    assert cramped["limit_bytes"] == 2**20
    assert "give [workers] gpu_memory at least" in "\n".join(cramped["headline"])
    roomy = plan.run(tiny_config(workers__gpus=0, workers__memory="900GiB", workers__gpu_memory="1MiB"), force=False)
    assert roomy["limit_bytes"] == 900 * 2**30


STUDENT = LLAMA_2 | {"num_hidden_layers": 16}


def test_distillation_counts_teacher_and_student_apart():
    memory = predict(Request(STUDENT, "full", WORK, teaching=Teaching(LLAMA_2)))
    student = num_parameters(skeleton_of(LLAMA_2, num_layers=16))
    assert memory.teacher / 1e9 == pytest.approx(13.48, abs=0.005)
    assert memory.weights == 4 * student
    assert memory.optimizer == 8 * student


def test_a_teacher_in_4_bits_elsewhere_or_silent_leaves_room():
    def plan_with(**changes):
        return predict(Request(STUDENT, "full", WORK, teaching=Teaching(LLAMA_2)._replace(**changes)))

    whole, quantized = plan_with(), plan_with(quantization=Quantization("nf4"), adapter_rank=16)
    head, silent = plan_with(place="head"), plan_with(place="none")
    assert quantized.teacher / 1e9 == pytest.approx(3.763 + 0.103 + 0.160, abs=0.005)
    assert head.teacher == 32000 * 4096 * 2
    assert silent == predict(Request(STUDENT, "full", WORK))._replace(method=silent.method)
    assert whole.total > quantized.total > head.total > silent.total
    assert plan_with(hidden_pairs=16).activations - whole.activations == 16 * 64 * 2 * 4096 * (2 + 4)


def test_all_teachers_are_planned_and_go_forward_one_after_the_other():
    one, other = (predict(Request(STUDENT, "full", WORK, teaching=Teaching(settings))) for settings in (LLAMA_2, STUDENT))
    both = predict(Request(STUDENT, "full", WORK, teaching=Teaching(LLAMA_2, others=(STUDENT,))))
    silent = predict(Request(STUDENT, "full", WORK))
    assert both.teacher == one.teacher + other.teacher
    assert both.logits - silent.logits == one.logits + other.logits - 2 * silent.logits
    assert max(one.activations, other.activations) >= both.activations
    assert both.method == "distillation, 16 of 32 layers, 2 teachers"
    stored = Teaching(LLAMA_2, quantization=Quantization("nf4"), adapter_rank=8, others=(STUDENT,)).each
    assert [(each.quantization.type, each.adapter_rank, each.others) for each in stored] == [("nf4", 8, ()), ("nf4", 0, ())]


def test_an_adapter_on_the_student_is_planned_as_one_on_any_model():
    alone = predict(Request(STUDENT, "qlora", WORK, Lora(16)))
    taught = predict(Request(STUDENT, "qlora", WORK, Lora(16), teaching=Teaching(LLAMA_2)))
    for part in ("weights", "constants", "adapter", "gradients", "optimizer"):
        assert getattr(taught, part) == getattr(alone, part)
    assert taught.method == "distillation, 16 of 32 layers, QLoRA r=16, NF4 + DQ"
    assert taught.teacher > 13e9


def test_pool_and_cache_are_planned_against_what_they_are_given(tiny_config, tmp_path):
    cache = {"folder": str(tmp_path / "cache")}
    config = tiny_config(distill__targets="pool", distill__pool={"memory": "1GiB"}, distill__cache=cache, distill__dtype="float32")
    summary = plan.run(config, force=False)
    assert summary["distill"]["pool"]["teacher"] == num_parameters(skeleton_of(_config(Path(config.teacher.model)))) * 4
    assert summary["distill"]["cache"]["bytes_per_token"] == 64 * 2
    lines = "\n".join(summary["headline"])
    assert "distill.pool.memory gives 1.00 GiB (1.07 GB): fits" in lines
    assert "cache: 128 bytes a trained token of a budget of 50.00 GiB (53.69 GB); tokens unknown" in lines
    kept = cache_plan({"keep": "top_k", "top_k": 64, "dtype": "bfloat16"}, teachers=[LLAMA_2], tokens=10**9, budget=31 * 10**9)
    assert kept.total == 10**9 * TopKCodec(64, 32000).bytes_per_position
    assert "does not fit: 90% are computed each time" in kept.line
    with pytest.raises(ConfigError, match=r"an actor of \[distill.pool\] needs .* distill.pool.memory gives 100.00 MiB"):
        distill.check(tiny_config(distill__targets="pool", distill__pool={"memory": "100MiB"}))


def test_the_cheapest_changes_of_a_distillation_are_the_teachers():
    request = Request(STUDENT, "lora", WORK, Lora(2), teaching=Teaching(LLAMA_2))
    need = predict(request._replace(teaching=request.teaching._replace(quantization=Quantization("nf4")))).total
    assert smallest_change(request, Limits(need, 2**40)) == 'set distill.teacher_quantization = "nf4"'
    assert smallest_change(request, Limits(need - 2**31, 2**40)) == 'set distill.targets = "pool"'


def test_families_with_other_fields_are_planned(tiny_config, tmp_path):
    gpt2 = GPT2Config(vocab_size=97, n_embd=32, n_head=2, n_layer=4)
    qwen = {k: v for k, v in SMALL.items() if k != "model_type"} | {"num_hidden_layers": 4, "head_dim": 8}
    for number, config in enumerate([gpt2, Qwen3Config(**qwen, layer_types=["sliding_attention", "full_attention"] * 2)]):
        config.save_pretrained(tmp_path / str(number))
        rows = plan.run(tiny_config(teacher__model=str(tmp_path / str(number)), finetune__lora={"rank": 2}), force=False)["rows"]
        assert rows[-1]["method"] == "distillation, 2 of 4 layers"
        assert rows[-1]["activations"] > 0


def test_table_agrees_with_the_converted_built_in_model(smollm2):
    built_in, converted = (num_parameters(skeleton_of(s)) for s in (find_architecture("smollm2-135m-instruct").settings, _config(smollm2)))
    assert built_in == converted == 134515008


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def test_unknown_model_is_one_line():
    with pytest.raises(ModelError, match=r"no/such-model.*meta-llama/Llama-2-7b-hf") as caught:
        find_architecture("no/such-model")
    assert "\n" not in str(caught.value)


def test_folder_without_a_config_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        find_architecture(str(tmp_path))


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("llama*.toml")))
def test_ready_runs_fit_and_the_page_shows_their_plan(name, tmp_path):
    summary = plan.run(load_config(CONFIGS / name, ["--run.storage", str(tmp_path)]), force=False)
    rows = {row["method"]: row for row in summary["rows"]}
    assert rows[summary["configured"]]["fits"] and summary["finetune"]["fits"]
    assert summary["finetune"]["largest_micro_batch_size"] >= 1
    assert not rows["base, float32"]["fits"]
    assert "built-in table" in summary["headline"][0]
    shown = "\n".join(line.rstrip() for line in summary["headline"])
    assert plan_tables.shown(name) == shown, "python -m benchmarks.plan_tables brings docs/memory.md up to date"


def test_what_does_not_fit_says_so_and_names_what_does(tiny_config):
    roomy = plan.run(tiny_config(), force=False)
    totals = {row["method"]: row["total"] for row in roomy["rows"] if row["job"] == "finetune"}
    _, lora, *_, nf4, _ = totals.values()
    tight = plan.run(tiny_config(workers__memory=f"{(lora + nf4) // 2}B"), force=False)
    assert tight["first_that_fits"] not in [None, *list(totals)[:2]]
    assert any("does not fit; set finetune" in line for line in tight["headline"])
    none = plan.run(tiny_config(workers__memory="1MiB"), force=False)
    assert none["first_that_fits"] is None
    assert any("give [workers] memory at least" in line and "no method fits" in line for line in none["headline"])
    json.dumps(none)


def test_bad_students_and_adapters_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"student\.layers = 9"):
        plan.run(tiny_config(student__layers=9), force=False)
    with pytest.raises(ConfigError, match="names no linear module"):
        plan.run(tiny_config(finetune__lora={"targets": ["q_porj"]}), force=False)


def test_plan_is_a_command_without_ray_that_writes_nothing(tmp_path):
    config = tmp_path / "plan.toml"
    config.write_text(f'run = {{ name = "x", storage = "{tmp_path / "runs"}" }}\nstudent.layers = 15\nworkers.memory = "4GiB"\n')
    main = f"import sys; from ray_jobs.__main__ import main; code = main(['plan', {str(config)!r}, '--json'])"
    script = f"{main}; sys.exit(code or 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["limit_bytes"] == 4 * 2**30
    assert not (tmp_path / "runs").exists()
