"""`raystill distill` where `distill.task` is of encoders: teach a small encoder what a large one says of texts, with Ray Train."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from ray_jobs.core.cluster import connect
from ray_jobs.core.config import Config
from ray_jobs.core.models import check_context, resolve_model
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import RunFolder, versions
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.encoders.job import EncoderJob
from ray_jobs.training.job_plan import JobPlan

if TYPE_CHECKING:
    from ray_jobs.distillation.model_card import Lineage


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Train the student on the packed texts of `prepare`, and return the manifest.

    Raises:
        ConfigError: as `check`.
        ClusterError: no node can hold a worker.
        TrainingFailed: workers were lost too often, or one passed its memory limit, or the loss is no number.
    """
    folder = RunFolder(config)
    counts = folder.finished("prepare")["counts"]
    plan = check(config) if folder.is_due("distill", after=["prepare"], force=force) else None
    stage = folder.stage("distill", sections=["teacher", "student", "distill"], after=["prepare"], force=force)
    if stage.manifest:
        say("distill: done already")
        return stage.manifest
    from ray_jobs.distillation.encoders.card import encoder_card
    from ray_jobs.distillation.encoders.outcome import encoder_facts, encoder_headline
    from ray_jobs.training.fit_check import against_measured
    from ray_jobs.training.optimizers import describe_optimizer

    optimizer = describe_optimizer(config.distill.optimizer, config.workers.device)
    with connect():
        encoder = _with_layers(config, stage.folder, folder.folder("prepare"))
        say(f"distill: {encoder.words} on {counts['train_rows']} rows with {optimizer}")
        result = _train(config, encoder, stage.folder, folder.folder("prepare"), counts, plan)
    facts = encoder_facts(result, teacher=resolve_model(config.teacher.model), student=stage.folder.local("student"))
    facts |= {"optimizer": optimizer, "memory_plan": against_measured(plan, result), "layers": encoder.kept()}
    stage.folder.write_bytes("student/README.md", encoder_card(_lineage(config, counts), facts).encode())
    return stage.finish(**facts, headline=encoder_headline(facts), next="raystill report CONFIG")


def _train(
    config: Config, encoder: EncoderJob, target: Storage, rows: Storage, counts: dict[str, Any], plan: JobPlan | None
) -> dict[str, Any]:
    from ray_jobs.training.ray_train import TrainingJob, Workers, fit
    from ray_jobs.training.recipe import Recipe

    section = config.distill
    job = TrainingJob(
        build=encoder.build,
        export=encoder.export,
        export_name="student",
        storage=target,
        rows=rows,
        open_rows=encoder.open_rows,
        evaluate=counts["eval_rows"] > 0,
        recipe=Recipe.of(section.model_dump(), seed=config.run.seed),
        trackers=tuple(config.run.trackers),
        title=f"{config.run.name}/distill",
        plan=plan,
    )
    options = {"max_failures": section.max_failures, "keep_checkpoints": section.keep_checkpoints, "label": "distill"}
    return fit(job, workers=Workers.of(config.workers), **options)


def check(config: Config) -> JobPlan:
    """Refuse what cannot be taught, before anything starts, and return the memory plan; loads no weights.

    Raises:
        ConfigError: a model that cannot do the task, layers or pairs of them that there are not, a student with another
            vocabulary, width or classes, rows longer than a model's positions, fields that encoders do not have, a tracker that is
            not installed, a strategy that cannot work with the optimizer or with encoders, or more memory than a worker has.
    """
    from ray_jobs.distillation.encoders.plan import check_encoder_fits
    from ray_jobs.training.fit_check import limits_of
    from ray_jobs.training.pairings import Pairing, refuse_pairing
    from ray_jobs.training.trackers import check_trackers

    check_trackers(config.run.trackers)
    section, workers, encoder = config.distill, config.workers, encoder_job(config)
    refuse_pairing(Pairing(workers.strategy, workers.zero_stage, section.optimizer))
    encoder.check()
    for name in filter(None, (config.teacher.model, config.student.model)):
        check_context(resolve_model(name), name, config.data.max_length)
    request = encoder.memory_request(length=config.data.max_length, section=section.model_dump(), workers=workers)
    return check_encoder_fits(request, limits_of(workers))


def encoder_job(config: Config) -> EncoderJob:
    """Return the config's job in plain values.

    Raises:
        ConfigError: a field asks for what encoders do not have.
    """
    student, distill = config.student.model_dump(), config.distill.model_dump()
    return EncoderJob.of(teacher=config.teacher.model, student=student, distill=distill, seed=config.run.seed)


def _with_layers(config: Config, stage: Storage, rows: Storage) -> EncoderJob:
    """Return the job with the student's layers; they are measured here where they are chosen so."""
    from ray_jobs.distillation.tasks import influential_layers

    encoder = encoder_job(config)
    if config.student.choose == "even" or not isinstance(encoder.layers, int):
        return encoder
    measure = functools.partial(encoder.measure_influence, rows, config.workers.device, config.distill.micro_batch_size)
    return dataclasses.replace(encoder, layers=influential_layers(measure, encoder.layers, stage, config.workers))


def _lineage(config: Config, counts: dict[str, Any]) -> "Lineage":
    from ray_jobs import __version__
    from ray_jobs.distillation.encoders.card import PIPELINE_TAGS
    from ray_jobs.distillation.model_card import Lineage

    return Lineage(
        teacher=config.teacher.model,
        taught=None,
        own_model=config.student.model,
        start=config.student.start,
        data=counts,
        distill=config.distill.model_dump(),
        versions={"raystill": __version__, **versions()},
        pipeline_tag=PIPELINE_TAGS[config.distill.task],
    )
