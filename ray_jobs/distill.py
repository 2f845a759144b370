"""Teach the student what the teacher knows, with Ray Train; the student is cut from the teacher or a model of its own."""

import functools
from pathlib import Path
from typing import Any

from ray_jobs.core.cluster import connect
from ray_jobs.core.config import Config
from ray_jobs.core.models import check_context, resolve_model
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import ModelSource, RunFolder
from ray_jobs.training.job_plan import JobPlan


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Train the student on the packed rows of `prepare` and the fine-tuned teacher, and return the manifest.

    Raises:
        ConfigError: layers that the teacher does not have, a student with another vocabulary, or a tracker that is not installed.
        ClusterError: no node can hold a worker.
        TrainingFailed: workers were lost too often, or one passed its memory limit.
    """
    folder = RunFolder(config)
    prepared = folder.finished("prepare")
    folder.finished("finetune")
    plan = check(config) if folder.is_due("distill", after=["prepare", "finetune"], force=force) else None
    stage = folder.stage("distill", sections=["teacher", "student", "distill"], after=["prepare", "finetune"], force=force)
    if stage.manifest:
        say("distill: done already")
        return stage.manifest
    from ray_jobs.training.fit_check import against_measured
    from ray_jobs.training.optimizers import describe_optimizer
    from ray_jobs.training.ray_train import TrainingJob, Workers, fit
    from ray_jobs.training.recipe import Recipe

    section = config.distill
    student = config.student.model or f"{config.student.layers} layers of the teacher"
    optimizer = describe_optimizer(section.optimizer, config.workers.device)
    say(f"distill: the teacher into {student} on {prepared['counts']['train_rows']} rows with {optimizer}")
    job = TrainingJob(
        build=functools.partial(_build, config, folder.model("teacher")),
        export=functools.partial(_export, config.student.model or config.teacher.model),
        export_name="student",
        storage=stage.folder,
        rows=folder.folder("prepare"),
        evaluate=prepared["counts"]["eval_rows"] > 0,
        recipe=Recipe.of(section.model_dump(), seed=config.run.seed),
        trackers=tuple(config.run.trackers),
        title=f"{config.run.name}/distill",
        plan=plan,
    )
    with connect():
        result = fit(
            job,
            workers=Workers.of(config.workers),
            max_failures=section.max_failures,
            keep_checkpoints=section.keep_checkpoints,
            label="distill",
        )
    facts = {**_facts(result, config.teacher.model), "optimizer": optimizer, "memory_plan": against_measured(plan, result)}
    return stage.finish(**facts, headline=_headline(facts), next="raystill answer CONFIG")


def check(config: Config) -> JobPlan:
    """Refuse a student that cannot be, before anything starts, and return the memory plan; loads no weights.

    Raises:
        ConfigError: layers that the teacher does not have, a student with another vocabulary, rows longer than a model's
            positions, a strategy that cannot work with the optimizer, a tracker that is not installed, or more memory than
            a worker has (the table is then on stderr).
    """
    from ray_jobs.distillation.layers import choose_layers
    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.pairings import Pairing, refuse_pairing
    from ray_jobs.training.trackers import check_trackers

    check_trackers(config.run.trackers)
    refuse_pairing(Pairing(config.workers.strategy, config.workers.zero_stage, config.distill.optimizer))
    for name in filter(None, (config.teacher.model, config.student.model)):
        check_context(resolve_model(name), name, config.data.max_length)
    if config.student.model is None:
        choose_layers(find_architecture(config.teacher.model).config.num_hidden_layers, config.student.layers)
        return _memory_plan(config)
    from ray_jobs.distillation.student import check_vocabulary
    from ray_jobs.training.models import load_tokenizer

    student, teacher = (load_tokenizer(resolve_model(name)).get_vocab() for name in (config.student.model, config.teacher.model))
    check_vocabulary(student, teacher)
    return _memory_plan(config)


def _memory_plan(config: Config) -> JobPlan:
    from ray_jobs.distillation.student import student_settings
    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.fit_check import check_fits, limits_of, request_of

    teacher, named = find_architecture(config.teacher.model), config.student.model
    student = find_architecture(named).settings if named else student_settings(teacher.config, config.student.layers)
    section = config.distill.model_dump()
    request = request_of(section, settings=teacher.settings, length=config.data.max_length, workers=config.workers, student=student)
    return check_fits(request, limits_of(config.workers))


def _build(config: Config, source: ModelSource, device: str) -> tuple[Any, Any]:
    import torch

    from ray_jobs.distillation.divergence import Divergence
    from ray_jobs.distillation.layers import choose_layers
    from ray_jobs.distillation.loss import DistillLoss
    from ray_jobs.distillation.student import build_student, check_head_width
    from ray_jobs.distillation.targets import WorkerTeacher
    from ray_jobs.training.adapters import load_named
    from ray_jobs.training.models import choose_dtype, load_model

    section, student = config.distill, config.student
    teacher = load_named(*source, dtype=choose_dtype(section.dtype, device), device=device)
    if student.model is None:
        model = build_student(teacher, choose_layers(teacher.config.num_hidden_layers, student.layers)).to(device)
    else:
        model = load_model(resolve_model(student.model), dtype=torch.float32, device=device)
        check_head_width(model, teacher)
    divergence = Divergence(section.divergence, beta=section.beta, skew=section.skew, temperature=section.kd_temperature)
    loss = DistillLoss(WorkerTeacher(teacher), divergence=divergence, kd_weight=section.kd_weight, ce_weight=section.ce_weight)
    return model, loss


def _export(tokenizer_of: str, model: Any, folder: Path) -> None:
    from ray_jobs.training.models import load_tokenizer

    model.save_pretrained(folder)
    load_tokenizer(resolve_model(tokenizer_of)).save_pretrained(folder)


def _facts(result: dict[str, Any], teacher: str) -> dict[str, Any]:
    from ray_jobs.training.models import skeleton

    before, after = ((result[key] or {}).get("terms", {}) for key in ("eval_before", "eval_after"))
    return {
        "counts": {"steps": result["steps"], "tokens": result["tokens"]},
        "num_parameters": {
            "teacher": sum(p.numel() for p in skeleton(resolve_model(teacher)).parameters()),
            "student": result["total_parameters"],
        },
        "eval": {
            "kl_before_nats": before.get("kl"),
            "kl_after_nats": after.get("kl"),
            "ce_teacher_nats": after.get("ce_teacher"),
            "ce_before_nats": before.get("ce"),
            "ce_after_nats": after.get("ce"),
        },
        "train_seconds": result["train_seconds"],
        "peak_bytes": result["peak_bytes"],
        "gpu_peak_bytes": result["gpu_peak_bytes"],
        "memory": result["memory"],
    }


def _headline(facts: dict[str, Any]) -> list[str]:
    losses, size = facts["eval"], facts["num_parameters"]
    shown = "no held-out rows"
    if losses["kl_after_nats"] is not None:
        shown = "KL to the teacher {kl_before_nats:.3f} -> {kl_after_nats:.3f} nats, held-out loss {ce_before_nats:.3f} -> ".format(
            **losses
        )
        shown += "{ce_after_nats:.3f} (teacher {ce_teacher_nats:.3f})".format(**losses)
    share = size["student"] / size["teacher"]
    rate = facts["counts"]["tokens"] / max(facts["train_seconds"], 1e-9)
    return [
        f"distill: {shown}, {size['student'] / 1e6:.1f} M of {size['teacher'] / 1e6:.1f} M parameters ({share:.0%}), "
        f"{facts['counts']['steps']} steps, {rate:.0f} tokens/s, peak {max(facts['peak_bytes']) / 2**30:.2f} GiB a worker",
        *filter(None, [facts["memory_plan"].get("line")]),
    ]
