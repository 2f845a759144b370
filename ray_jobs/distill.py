"""Teach the student what the teacher knows, with Ray Train; the student is cut from the teacher or a model of its own."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_jobs.core.cluster import connect
from ray_jobs.core.config import Config
from ray_jobs.core.models import resolve_model
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import ModelSource, RunFolder, Stage, versions
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.shares import EVERYTHING
from ray_jobs.training.job_plan import JobPlan

if TYPE_CHECKING:
    from ray_jobs.distillation.job import DistillJob
    from ray_jobs.distillation.making import Student
    from ray_jobs.distillation.model_card import Lineage


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Train the student on the packed rows of `prepare` and the fine-tuned teacher, and return the manifest.

    Raises:
        ConfigError: as `check`.
        ClusterError: no node can hold a worker, or workers and pool do not fit beside each other.
        TrainingFailed: workers were lost too often, or one passed its memory limit.
    """
    folder = RunFolder(config)
    prepared = folder.finished("prepare")
    folder.finished("finetune")
    sources = prepared.get("sources") or {EVERYTHING: {}}
    plan = check(config, sources=list(sources)) if folder.is_due("distill", after=["prepare", "finetune"], force=force) else None
    stage = open_stage(folder, force=force)
    if stage.manifest:
        say("distill: done already")
        return stage.manifest
    from ray_jobs.distillation.model_card import model_card
    from ray_jobs.distillation.pool import job_pools
    from ray_jobs.distillation.summary import facts_of, headline
    from ray_jobs.distillation.tasks import find_start
    from ray_jobs.training.fit_check import against_measured
    from ray_jobs.training.optimizers import describe_optimizer

    job, rows = make_job(config, folder.model("teacher")), folder.folder("prepare")
    optimizer = describe_optimizer(config.distill.optimizer, config.workers.device)
    with connect():
        if config.distill.targets == "text":
            rows, prepared = _write_texts(config, stage.folder.sub("texts"), job.teacher, rows, prepared)
        student = job.student_from(find_start(job, stage.folder, rows, config.workers))
        say(f"distill: the teacher into {student.words} on {prepared['counts']['train_rows']} rows with {optimizer}")
        loads = {name: functools.partial(job.load_teacher, name=name) for name in job.teachers}
        with job_pools(config.distill, config.workers, loads) as pools:
            work = {
                "build": functools.partial(job.build, student, pools, prepared["counts"]["train_rows"], sources),
                "open_rows": job.open_rows(sources),
            }
            result = _train(config, student, work, stage.folder, rows, prepared["counts"], plan)
    facts = facts_of(result, num_parameters=job.num_parameters, teachers=job.told(sources))
    facts |= {
        "optimizer": optimizer,
        "memory_plan": against_measured(plan, result),
        "layers": student.start.layers and list(student.start.layers),
    }
    stage.folder.write_bytes("student/README.md", model_card(_lineage(config, folder, prepared), facts).encode())
    return stage.finish(**facts, headline=headline(facts), next="raystill answer CONFIG")


def open_stage(folder: RunFolder, *, force: bool) -> Stage:
    """Return the stage, ready to work in or finished; whether a cache rounds decides its result, and where the cache is does not.

    Raises:
        ConfigChanged: it was started with other settings.
        StageHeld: another process works on it.
    """
    rounds = {"distill.cache.rounds": folder.config.distill.cache.rounds}
    sections = ["teacher", "student", "distill"]
    return folder.stage("distill", sections=sections, after=["prepare", "finetune"], force=force, facts=rounds)


def check(config: Config, *, sources: Sequence[str] | None = None) -> JobPlan:
    """Refuse a student that cannot be, before anything starts, and return the memory plan; loads no weights.

    Args:
        sources: names of those in the packed rows; none where there are no rows yet.

    Raises:
        ConfigError: as `check_job`, or a tracker that is not installed.
        ModelError: a model cannot be found, or is quantized already where it is to be cut or stored in fewer bits.
    """
    from ray_jobs.distillation.job_checks import check_job
    from ray_jobs.training.trackers import check_trackers

    check_trackers(config.run.trackers)
    job, pool = make_job(config, ModelSource(config.teacher.model)), config.distill.pool
    given = {"workers": config.workers, "pool_bytes": pool.memory_bytes, "sources": sources}
    return check_job(job, finetuned=config.finetune.model_dump(), **given)


def make_job(config: Config, teacher: ModelSource) -> "DistillJob":
    """Return what the workers do.

    Args:
        teacher: the fine-tuned one, or its base where nothing is read but its shape.
    """
    from ray_jobs.distillation.job import DistillJob
    from ray_jobs.distillation.sources import Cache

    section = config.distill
    return DistillJob(
        teacher=teacher,
        base=config.teacher.model,
        student=config.student.model_dump(),
        distill=section.model_dump(),
        teacher_dtype=section.teacher_dtype,
        double_quantization=config.finetune.quantization.double_quantization,
        cache=Cache.of(section.cache),
        row_tokens=config.data.max_length,
        seed=config.run.seed,
    )


def _train(
    config: Config, student: "Student", work: dict[str, Any], target: Storage, rows: Storage, counts: dict[str, Any], plan: JobPlan | None
) -> dict[str, Any]:
    """Train, leave the plain student in the stage's folder, and return what `fit` does; `work` says how workers build and open rows."""
    from ray_jobs.distillation.tasks import merge_adapter
    from ray_jobs.training.ray_train import TrainingJob, Workers, fit
    from ray_jobs.training.recipe import Recipe

    section = config.distill
    job = TrainingJob(
        **work,
        export=functools.partial(student.write, device=config.workers.device),
        export_name=student.export_name,
        storage=target,
        rows=rows,
        evaluate=counts["eval_rows"] > 0,
        recipe=Recipe.of(section.model_dump(), seed=config.run.seed),
        trackers=tuple(config.run.trackers),
        title=f"{config.run.name}/distill",
        plan=plan,
    )
    options = {"max_failures": section.max_failures, "keep_checkpoints": section.keep_checkpoints, "label": "distill"}
    result = fit(job, workers=Workers.of(config.workers), **options)
    merge_adapter(student, target, config.workers)
    return result


def _write_texts(
    config: Config, texts: Storage, teacher: ModelSource, rows: Storage, prepared: dict[str, Any]
) -> tuple[Storage, dict[str, Any]]:
    """Return the folder of rows that the teacher wrote, and prepare's manifest with their counts."""
    from ray_jobs.corpus.template import ChatTemplate
    from ray_jobs.distillation.texts import training_questions, write_texts
    from serve.engines import open_engine

    section, data, workers = config.distill.text, config.data, config.workers
    source = teacher if section.model == "teacher" else ModelSource(section.model)
    options = {"dtype": config.distill.dtype, "device": workers.device, "num_threads": max(1, int(workers.cpus))}
    counts = write_texts(
        section.model_dump(),
        texts,
        rows,
        training_questions(rows, train_on_chunks=data.train_on_chunks, eval_share=data.eval_share),
        template=ChatTemplate(resolve_model(config.teacher.model), system_prompt=data.system_prompt),
        max_length=data.max_length,
        make_engine=functools.partial(open_engine, **source._asdict(), **options),
        workers=workers,
        seed=config.run.seed,
    )
    say(f"distill: {counts['answers']} answers, {counts['failed']} of them cannot be trained on")
    return texts, {**prepared, "counts": {**prepared["counts"], **counts}}


def _lineage(config: Config, folder: RunFolder, prepared: dict[str, Any]) -> "Lineage":
    from ray_jobs import __version__
    from ray_jobs.distillation.model_card import Lineage

    return Lineage(
        teacher=config.teacher.model,
        taught=folder.finished("finetune")["settings"].get("finetune.method", config.finetune.method),
        own_model=config.student.model,
        start=config.student.start,
        data=prepared["counts"],
        distill=config.distill.model_dump() | ({"kd_weight": 0, "hidden_weight": 0} if config.distill.targets == "text" else {}),
        versions={"raystill": __version__, **versions()},
    )
