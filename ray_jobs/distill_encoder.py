"""`raystill distill` where `distill.task` is of encoders: teach a small encoder what a large one says of texts, with Ray Train."""

from typing import Any

from ray_jobs.core.cluster import connect
from ray_jobs.core.config import Config
from ray_jobs.core.models import check_context, resolve_model
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.distillation.encoders.job import EncoderJob


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Train the student on the packed texts of `prepare`, and return the manifest.

    Raises:
        ConfigError: as `check`.
        ClusterError: no node can hold a worker.
        TrainingFailed: workers were lost too often, or one passed its memory limit.
    """
    folder = RunFolder(config)
    counts = folder.finished("prepare")["counts"]
    if folder.is_due("distill", after=["prepare"], force=force):
        check(config)
    stage = folder.stage("distill", sections=["teacher", "student", "distill"], after=["prepare"], force=force)
    if stage.manifest:
        say("distill: done already")
        return stage.manifest
    from ray_jobs.distillation.encoders.outcome import encoder_facts, encoder_headline
    from ray_jobs.training.optimizers import describe_optimizer
    from ray_jobs.training.ray_train import TrainingJob, Workers, fit
    from ray_jobs.training.recipe import Recipe

    section, encoder = config.distill, _job(config)
    optimizer = describe_optimizer(section.optimizer, config.workers.device)
    student = config.student.model or f"{config.student.layers} layers of the teacher"
    say(f"distill: {section.task} of {config.teacher.model} into {student} on {counts['train_rows']} rows with {optimizer}")
    job = TrainingJob(
        build=encoder.build,
        export=encoder.export,
        export_name="student",
        storage=stage.folder,
        rows=folder.folder("prepare"),
        open_rows=encoder.open_rows,
        evaluate=counts["eval_rows"] > 0,
        recipe=Recipe.of(section.model_dump(), seed=config.run.seed),
        trackers=tuple(config.run.trackers),
        title=f"{config.run.name}/distill",
    )
    options = {"max_failures": section.max_failures, "keep_checkpoints": section.keep_checkpoints, "label": "distill"}
    with connect():
        result = fit(job, workers=Workers.of(config.workers), **options)
    facts = encoder_facts(result, teacher=resolve_model(config.teacher.model), student=stage.folder.local("student"))
    return stage.finish(**facts, optimizer=optimizer, headline=encoder_headline(facts), next="raystill report CONFIG")


def check(config: Config) -> None:
    """Refuse what cannot be taught, before anything starts; loads no weights. Memory is not predicted, only held to its limit.

    Raises:
        ConfigError: a model that cannot do the task, layers or pairs of them that there are not, a student with another
            vocabulary or width, rows longer than a model's positions, fields that encoders do not have, a tracker that is
            not installed, or a strategy that cannot work with the optimizer.
    """
    from ray_jobs.training.pairings import Pairing, refuse_pairing
    from ray_jobs.training.trackers import check_trackers

    check_trackers(config.run.trackers)
    refuse_pairing(Pairing(config.workers.strategy, config.workers.zero_stage, config.distill.optimizer))
    _job(config).check()
    for name in filter(None, (config.teacher.model, config.student.model)):
        check_context(resolve_model(name), name, config.data.max_length)


def _job(config: Config) -> EncoderJob:
    student, distill = config.student.model_dump(), config.distill.model_dump()
    return EncoderJob.of(teacher=config.teacher.model, student=student, distill=distill, seed=config.run.seed)
