"""Teach the teacher the course: LoRA or QLoRA adapters on the base model, with Ray Train."""

import functools
from pathlib import Path
from typing import Any

from ray_jobs.core.cluster import connect
from ray_jobs.core.config import Config
from ray_jobs.core.models import resolve_model
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import RunFolder


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Train an adapter on the packed rows of `prepare`, and return the manifest.

    Raises:
        ConfigError: as `check`.
        ClusterError: no node can hold a worker.
        TrainingFailed: workers were lost too often, or one passed its memory limit.
    """
    folder = RunFolder(config)
    prepared = folder.finished("prepare")
    if force or not folder.folder("finetune").exists("manifest.json"):
        check(config)
    stage = folder.stage("finetune", sections=["teacher", "finetune"], after=["prepare"], force=force)
    if stage.manifest:
        say("finetune: done already")
        return stage.manifest
    from ray_jobs.training.ray_train import TrainingJob, Workers, fit
    from ray_jobs.training.recipe import Recipe

    section = config.finetune
    say(f"finetune: {section.method} of {config.teacher.model} on {prepared['counts']['train_rows']} rows")
    job = TrainingJob(
        build=functools.partial(_build, config.teacher.model, section.model_dump()),
        export=functools.partial(_export, config.teacher.model),
        export_name="adapter",
        storage=stage.folder,
        rows=folder.folder("prepare"),
        evaluate=prepared["counts"]["eval_rows"] > 0,
        recipe=Recipe.of(section.model_dump(), seed=config.run.seed),
    )
    with connect():
        result = fit(
            job,
            workers=Workers.of(config.workers),
            max_failures=section.max_failures,
            keep_checkpoints=section.keep_checkpoints,
            label="finetune",
        )
    return stage.finish(**_facts(result), headline=_headline(result), next="raystill distill CONFIG")


def check(config: Config) -> None:
    """Refuse adapters that the teacher cannot hold, before anything starts; loads no weights.

    Raises:
        ConfigError: unknown LoRA targets or a rank larger than a layer.
        ModelError: the teacher cannot be found, or is no causal language model.
    """
    from ray_jobs.training.models import check_lora, skeleton

    lora = config.finetune.lora
    check_lora(skeleton(resolve_model(config.teacher.model)), rank=lora.rank, targets=lora.targets)


def _build(name: str, section: dict[str, Any], device: str) -> tuple[Any, Any]:
    from ray_jobs.training.losses import cross_entropy_loss
    from ray_jobs.training.models import Quantization, add_lora, choose_dtype, load_model

    quantization = Quantization(**section["quantization"]) if section["method"] == "qlora" else None
    model = load_model(resolve_model(name), dtype=choose_dtype(section["dtype"], device), quantization=quantization, device=device)
    return add_lora(model, **section["lora"]), cross_entropy_loss


def _export(name: str, model: Any, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = name  # not the path of this machine's cache
    model.save_pretrained(folder, save_embedding_layers=False)


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    before, after = (result[key] and result[key]["loss"] for key in ("eval_before", "eval_after"))
    counts = {key: result[key] for key in ("steps", "tokens", "trainable_parameters", "total_parameters")}
    return {
        "counts": counts,
        "eval": {"base_nats": before, "teacher_nats": after},
        "train_seconds": result["train_seconds"],
        "peak_bytes": result["peak_bytes"],
        "gpu_peak_bytes": result["gpu_peak_bytes"],
    }


def _headline(result: dict[str, Any]) -> list[str]:
    facts = _facts(result)
    peak = max(result["peak_bytes"]) / 2**30
    losses = (
        "" if facts["eval"]["base_nats"] is None else "held-out loss {base_nats:.3f} -> {teacher_nats:.3f} nats, ".format(**facts["eval"])
    )
    rate = result["tokens"] / max(result["train_seconds"], 1e-9)
    return [f"finetune: {losses}{result['steps']} steps, {result['tokens']} tokens, {rate:.0f} tokens/s, peak {peak:.2f} GiB a worker"]
