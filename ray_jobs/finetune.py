"""Teach the teacher the course: full, LoRA or QLoRA training of the base model, with Ray Train."""

import functools
from pathlib import Path
from typing import Any

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config
from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import check_context, resolve_model
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.run_lock import RunLock
from ray_jobs.core.storage import Storage
from ray_jobs.core.tasks import start_task, task_results
from ray_jobs.training.job_plan import JobPlan

EXPORTS = {"full": "teacher", "lora": "adapter", "qlora": "adapter"}
"""What each method leaves in the stage's folder: a plain model folder, or an adapter in PEFT's format."""
MERGED = "merged"
MERGED_FACTS = "merged.json"
"""Written after the merged folder: without it the folder may be half of one."""


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Train on the packed rows of `prepare`, and return the manifest; with `finetune.merge`, also merge the adapter.

    Raises:
        ConfigError: as `check`.
        ClusterError: no node can hold a worker.
        TrainingFailed: workers were lost too often, or one passed its memory limit.
    """
    folder = RunFolder(config)
    prepared = folder.finished("prepare")
    plan = check(config) if folder.is_due("finetune", after=["prepare"], force=force) else None
    stage = folder.stage("finetune", sections=["teacher", "finetune"], after=["prepare"], force=force)
    if stage.manifest:
        say("finetune: done already")
    else:
        result = _train(config, stage.folder, folder.folder("prepare"), prepared["counts"], plan)
        facts = _facts(config, result, plan)
        stage.finish(**facts, headline=_headline(result, facts), next="raystill distill CONFIG")
    manifest = stage.manifest
    return _with_merged(manifest, _merge(config, folder)) if config.finetune.merge else manifest


def check(config: Config) -> JobPlan:
    """Refuse what the teacher cannot be trained with, before anything starts, and return the plan; loads no weights.

    Raises:
        ConfigError: a strategy that cannot work with the optimizer or the base's storage, unknown LoRA targets, a rank larger
            than a layer, rows longer than the model's positions, DoRA on int8 weights on a CPU, a tracker that is not installed, or
            more memory than a worker has (the table is then on stderr).
        ModelError: the teacher cannot be found, is no causal language model, or is quantized already.
    """
    from ray_jobs.training.adapters import check_lora, check_storage
    from ray_jobs.training.models import check_unquantized, skeleton
    from ray_jobs.training.pairings import refuse_pairing
    from ray_jobs.training.trackers import check_trackers

    check_trackers(config.run.trackers)
    if config.distill.task != "language_model":
        raise ConfigError(
            f'finetune trains language models, and distill.task = "{config.distill.task}" has an encoder as its teacher: '
            "run `raystill prepare CONFIG`, then `raystill distill CONFIG`"
        )
    section, lora = config.finetune, config.finetune.lora
    refuse_pairing(_pairing(config))
    model = resolve_model(config.teacher.model)
    check_context(model, config.teacher.model, config.data.max_length)
    if section.method != "lora":
        check_unquantized(model, what=f"finetune.method = {section.method}")
    if section.method == "qlora":
        check_storage(section.quantization.type, dora=lora.dora, device=config.workers.device)
    if section.method != "full":
        check_lora(skeleton(model), rank=lora.rank, targets=lora.targets)
    return _memory_plan(config)


def _memory_plan(config: Config) -> JobPlan:
    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.fit_check import check_fits, limits_of, request_of

    settings = find_architecture(config.teacher.model).settings
    section = config.finetune.model_dump()
    request = request_of(section, settings=settings, length=config.data.max_length, workers=config.workers)
    return check_fits(request, limits_of(config.workers))


def _train(config: Config, target: Storage, rows: Storage, counts: dict[str, Any], plan: JobPlan | None) -> dict[str, Any]:
    from ray_jobs.training.optimizers import describe_optimizer
    from ray_jobs.training.ray_train import TrainingJob, Workers, fit
    from ray_jobs.training.recipe import Recipe

    section = config.finetune
    optimizer = describe_optimizer(section.optimizer, config.workers.device)
    say(f"finetune: {section.method} of {config.teacher.model} on {counts['train_rows']} rows with {optimizer}")
    job = TrainingJob(
        build=functools.partial(_build, config.teacher.model, section.model_dump(), _pairing(config).shards_parameters),
        export=functools.partial(_export, config.teacher.model, section.dtype, config.workers.device),
        export_name=EXPORTS[section.method],
        storage=target,
        rows=rows,
        evaluate=counts["eval_rows"] > 0,
        recipe=Recipe.of(section.model_dump(), seed=config.run.seed),
        trackers=tuple(config.run.trackers),
        title=f"{config.run.name}/finetune",
        plan=plan,
    )
    with connect():
        return fit(
            job,
            workers=Workers.of(config.workers),
            max_failures=section.max_failures,
            keep_checkpoints=section.keep_checkpoints,
            label="finetune",
        )


def _pairing(config: Config) -> Any:
    from ray_jobs.training.pairings import Pairing

    section, workers = config.finetune, config.workers
    return Pairing(workers.strategy, workers.zero_stage, section.optimizer, section.method, section.quantization.type, section.lora.dora)


def _build(name: str, section: dict[str, Any], sharded: bool, device: str) -> tuple[Any, Any]:
    import torch

    from ray_jobs.training.adapters import add_lora
    from ray_jobs.training.losses import cross_entropy_loss
    from ray_jobs.training.models import choose_dtype, load_model

    full = section["method"] == "full"
    dtype = torch.float32 if full else choose_dtype(section["dtype"], device)  # what trains is kept in float32
    # quantizing needs whole weights, and DoRA starts from their norms
    postponed = sharded and (full or (section["method"] == "lora" and not section["lora"]["dora"]))
    model = load_model(resolve_model(name), dtype=dtype, quantization=_quantization(section), device=device, postponed=postponed)
    if full:
        return model, cross_entropy_loss
    lora = {key: value for key, value in section["lora"].items() if key != "plus_ratio"}  # the optimizer's
    return add_lora(model, **lora), cross_entropy_loss


def _quantization(section: dict[str, Any]) -> Any:
    from ray_jobs.training.models import Quantization

    return Quantization(**section["quantization"]) if section["method"] == "qlora" else None


def _export(name: str, dtype: str, device: str, model: Any, folder: Path) -> None:
    """Write an adapter, or a model trained whole in the type it was computed in, with its tokenizer.

    Args:
        device: where it was trained; a model that was in pieces lies on the CPU by now.
    """
    from peft import PeftModel

    from ray_jobs.training.models import choose_dtype, load_tokenizer

    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = name  # not the path of this machine's cache
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    model.to(choose_dtype(dtype, device)).save_pretrained(folder)
    load_tokenizer(resolve_model(name)).save_pretrained(folder)


def _merge(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Return the facts of the merged folder, writing it first where it is not there."""
    target = folder.folder("finetune")
    lock = RunLock(folder.owner("finetune"), "finetune")
    try:
        if target.exists(MERGED_FACTS):
            say("finetune: merged already")
            return target.read_json(MERGED_FACTS)
        say(f"finetune: merging the adapter into {config.teacher.model}")
        with connect():
            bundle = config.workers.bundle
            require("[workers] of the merge", bundle)
            task_results([start_task(_write_merged, config, target, bundle=bundle)], what="finetune")
        return target.read_json(MERGED_FACTS)
    finally:
        lock.release()


def _write_merged(config: Config, target: Storage) -> None:
    """Task: write the base as it was trained on, with the adapter added, and the facts of it last."""
    import tempfile

    from ray_jobs.core.memory import peak_bytes
    from ray_jobs.training.adapters import load_merged
    from ray_jobs.training.memory import hold_gpu, memory_limit
    from ray_jobs.training.models import choose_dtype, load_tokenizer

    section, workers = config.finetune, config.workers
    base, adapter = resolve_model(config.teacher.model), target.local("adapter")
    quantization, device = _quantization(section.model_dump()), workers.device
    dtype = choose_dtype(section.dtype, device)
    hold_gpu(device, workers.gpu_memory_bytes)
    with memory_limit(workers.memory_bytes, gpu_limit_bytes=workers.gpu_memory_bytes), tempfile.TemporaryDirectory() as temporary:
        load_merged(base, adapter, dtype=dtype, quantization=quantization, device=device).save_pretrained(temporary)
        load_tokenizer(base).save_pretrained(temporary)
        target.upload(Path(temporary), MERGED)
        stored = quantization.type if quantization else None
        size = sum(file.stat().st_size for file in Path(temporary).iterdir())
        facts = {"dtype": str(dtype).removeprefix("torch."), "base_stored_in": stored, "size_bytes": size, "peak_bytes": peak_bytes()}
        target.write_json(MERGED_FACTS, facts)


def _with_merged(manifest: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    stored = f", of the base stored in {facts['base_stored_in']}" if facts["base_stored_in"] else ""
    line = f"finetune: merged: {facts['size_bytes'] / 1e9:.2f} GB in {facts['dtype']}{stored}"
    return {**manifest, "merged": facts, "headline": [*manifest["headline"], line]}


def _facts(config: Config, result: dict[str, Any], plan: JobPlan | None) -> dict[str, Any]:
    from ray_jobs.training.fit_check import against_measured
    from ray_jobs.training.optimizers import describe_optimizer

    before, after = (result[key] and result[key]["loss"] for key in ("eval_before", "eval_after"))
    counts = {key: result[key] for key in ("steps", "tokens", "trainable_parameters", "total_parameters")}
    return {
        "counts": counts,
        "optimizer": describe_optimizer(config.finetune.optimizer, config.workers.device),
        "eval": {"base_nats": before, "teacher_nats": after},
        "train_seconds": result["train_seconds"],
        "peak_bytes": result["peak_bytes"],
        "gpu_peak_bytes": result["gpu_peak_bytes"],
        "memory": result["memory"],
        "memory_plan": against_measured(plan, result),
    }


def _headline(result: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    peak = max(result["peak_bytes"]) / 2**30
    losses = (
        "" if facts["eval"]["base_nats"] is None else "held-out loss {base_nats:.3f} -> {teacher_nats:.3f} nats, ".format(**facts["eval"])
    )
    rate = result["tokens"] / max(result["train_seconds"], 1e-9)
    trained = f"finetune: {losses}{result['steps']} steps, {result['tokens']} tokens, {rate:.0f} tokens/s, peak {peak:.2f} GiB a worker"
    return [trained, *filter(None, [facts["memory_plan"].get("line")])]
