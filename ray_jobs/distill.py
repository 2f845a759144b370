"""Teach the student what the teacher knows, with Ray Train; the student is cut from the teacher or a model of its own."""

import functools
from typing import TYPE_CHECKING, Any

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config
from ray_jobs.core.models import check_context, resolve_model
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import ModelSource, RunFolder, versions
from ray_jobs.core.storage import Storage
from ray_jobs.core.tasks import start_task, task_results
from ray_jobs.training.job_plan import JobPlan

if TYPE_CHECKING:
    from ray_jobs.distillation.making import Student
    from ray_jobs.distillation.model_card import Lineage
    from ray_jobs.distillation.start import Start

INFLUENCE = "influence.json"
"""The measured block influences, in the stage's folder: measured once, also by a job that is resumed."""


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
    plan = check(config) if folder.is_due("distill", after=["prepare", "finetune"], force=force) else None
    stage = folder.stage("distill", sections=["teacher", "student", "distill"], after=["prepare", "finetune"], force=force)
    if stage.manifest:
        say("distill: done already")
        return stage.manifest
    from ray_jobs.distillation.model_card import model_card
    from ray_jobs.distillation.pool import job_pool
    from ray_jobs.distillation.summary import facts_of, headline
    from ray_jobs.training.fit_check import against_measured
    from ray_jobs.training.models import skeleton
    from ray_jobs.training.optimizers import describe_optimizer
    from ray_jobs.training.skeletons import num_parameters

    teacher, rows = folder.model("teacher"), folder.folder("prepare")
    optimizer = describe_optimizer(config.distill.optimizer, config.workers.device)
    with connect():
        if config.distill.targets == "text":
            rows, prepared = _write_texts(config, stage.folder.sub("texts"), teacher, rows, prepared)
        student = _student(config, _start(config, stage.folder, teacher, rows))
        say(f"distill: the teacher into {student.words} on {prepared['counts']['train_rows']} rows with {optimizer}")
        with job_pool(config.distill, config.workers, functools.partial(_load_teacher, config, teacher)) as pool:
            build = functools.partial(_build, config, teacher, student, pool, prepared["counts"]["train_rows"])
            result = _train(config, student, build, stage.folder, rows, prepared["counts"], plan)
    facts = facts_of(result, teacher_parameters=num_parameters(skeleton(resolve_model(config.teacher.model))))
    facts |= {
        "optimizer": optimizer,
        "memory_plan": against_measured(plan, result),
        "layers": student.start.layers and list(student.start.layers),
    }
    stage.folder.write_bytes("student/README.md", model_card(_lineage(config, folder, prepared), facts).encode())
    return stage.finish(**facts, headline=headline(facts), next="raystill answer CONFIG")


def _train(
    config: Config,
    student: "Student",
    build: Any,
    target: Storage,
    rows: Storage,
    counts: dict[str, Any],
    plan: JobPlan | None,
) -> dict[str, Any]:
    """Train, leave the plain student in the stage's folder, and return what `fit` does."""
    from ray_jobs.distillation.tasks import merge_student
    from ray_jobs.training.ray_train import TrainingJob, Workers, fit
    from ray_jobs.training.recipe import Recipe

    section = config.distill
    job = TrainingJob(
        build=build,
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
    result = fit(
        job,
        workers=Workers.of(config.workers),
        max_failures=section.max_failures,
        keep_checkpoints=section.keep_checkpoints,
        label="distill",
    )
    if not target.exists("student"):
        say("distill: merging the adapter into the student")
        require("[workers] of the merge", config.workers.bundle)
        task_results([start_task(merge_student, student, target, config.workers, bundle=config.workers.bundle)], what="distill")
    return result


def check(config: Config) -> JobPlan:
    """Refuse a student that cannot be, before anything starts, and return the memory plan; loads no weights.

    Raises:
        ConfigError: layers that the teacher does not have, a student with another vocabulary, rows longer than a model's
            positions, a strategy that cannot work with the optimizer or a quantized student, adapters that the student cannot
            hold, a tracker that is not installed, or more memory than a worker has (the table is then on stderr).
        ModelError: a model cannot be found, or is quantized already where it is to be cut or stored in fewer bits.
    """
    from ray_jobs.distillation.loss_checks import check_losses
    from ray_jobs.distillation.sources import check_cache
    from ray_jobs.distillation.teacher import check_teacher
    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.pairings import Pairing, refuse_pairing
    from ray_jobs.training.trackers import check_trackers

    check_trackers(config.run.trackers)
    section, lora = config.distill, config.distill.lora
    check_cache(section.cache.folder, section.cache.keep, kd_temperature=section.kd_temperature)
    workers, storage = config.workers, section.quantization.type
    refuse_pairing(Pairing(workers.strategy, workers.zero_stage, section.optimizer, section.method, storage, lora.dora))
    for name in filter(None, (config.teacher.model, config.student.model)):
        check_context(resolve_model(name), name, config.data.max_length)
    _student(config, _first_start(config, config.teacher.model)).check(_student_settings(config), device=workers.device)
    check_teacher(
        resolve_model(config.teacher.model),
        section.teacher_quantization,
        dora=config.finetune.method != "full" and config.finetune.lora.dora,
        device=workers.device,
    )
    check_losses(
        section.model_dump(),
        student=_student_settings(config),
        teacher=find_architecture(config.teacher.model).settings,
        start=_first_start(config, config.teacher.model),
        cuts_parameters=workers.strategy == "fsdp" or (workers.strategy == "deepspeed" and workers.zero_stage == 3),
    )
    return _memory_plan(config)


def _student_settings(config: Config) -> dict[str, Any]:
    from ray_jobs.distillation.student import student_settings
    from ray_jobs.training.architecture import find_architecture

    named = config.student.model
    if named:
        return find_architecture(named).settings
    return student_settings(find_architecture(config.teacher.model).config, config.student.layers)


def _memory_plan(config: Config) -> JobPlan:
    from ray_jobs.distillation.plan import check_pool, distill_request, pool_plan
    from ray_jobs.training.alternatives import Limits
    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.fit_check import check_fits, limits_of

    workers, pool = config.workers, config.distill.pool
    request = distill_request(
        config.distill.model_dump(),
        config.finetune.model_dump(),
        teacher=find_architecture(config.teacher.model).settings,
        student=_student_settings(config),
        length=config.data.max_length,
        workers=workers,
    )
    if config.distill.targets == "pool":
        limit = workers.gpu_memory_bytes if pool.gpus else pool.memory_bytes
        check_pool(pool_plan(request, gpus=pool.gpus), Limits(limit, pool.memory_bytes))
    return check_fits(request, limits_of(workers))


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


def _start(config: Config, stage: Storage, teacher: ModelSource, rows: Storage) -> "Start":
    """Return where the student's first weights come from; its layers are measured here where they are chosen so."""
    from ray_jobs.distillation.influence import influence_table, most_influential
    from ray_jobs.distillation.tasks import measure_layers

    start, student = _first_start(config, *teacher), config.student
    if student.choose == "even" or not isinstance(student.layers, int):
        return start
    if not stage.exists(INFLUENCE):
        require("[workers] of the layers' influence", config.workers.bundle)
        say("distill: measuring the influence of the teacher's layers")
        load, seed, rows_at_once = functools.partial(_load_teacher, config, teacher), config.run.seed, config.distill.micro_batch_size
        task = start_task(measure_layers, load, rows, seed, rows_at_once, config.workers, bundle=config.workers.bundle)
        stage.write_json(INFLUENCE, task_results([task], what="distill")[0])
    found = stage.read_json(INFLUENCE)
    layers = most_influential(found["influence"], student.layers)
    for line in influence_table(found, layers):
        say(f"distill: {line}")
    return start._replace(layers=tuple(layers))


def _first_start(config: Config, model: str, adapter: str | None = None) -> "Start":
    """Return the student's own model, or as many layers of the teacher, evenly spaced where they are not named."""
    from ray_jobs.distillation.layers import choose_layers
    from ray_jobs.distillation.start import Start
    from ray_jobs.training.architecture import find_architecture

    student = config.student
    if student.model is not None:
        return Start(student.model)
    layers = choose_layers(find_architecture(config.teacher.model).config.num_hidden_layers, student.layers)
    return Start(model, tuple(layers), adapter, config.run.seed if student.start == "random" else None)


def _load_teacher(config: Config, source: ModelSource, device: str) -> Any:
    from ray_jobs.distillation.teacher import load_teacher
    from ray_jobs.training.models import Quantization, choose_dtype

    kind, double = config.distill.teacher_quantization, config.finetune.quantization.double_quantization
    stored = None if kind == "none" else Quantization(kind, double)
    return load_teacher(*source, dtype=choose_dtype(config.distill.teacher_dtype, device), quantization=stored, device=device)


def _student(config: Config, start: "Start") -> "Student":
    from ray_jobs.distillation.making import Student
    from ray_jobs.distillation.vocabulary import chat_template, shared_vocabulary
    from ray_jobs.training.models import Quantization

    section, named = config.distill, config.student.model
    return Student(
        start,
        tokenizer=named or config.teacher.model,
        method=section.method,
        dtype=section.dtype,
        lora=section.lora.model_dump(exclude={"plus_ratio"}),  # which is the optimizer's
        quantization=Quantization(**section.quantization.model_dump()),
        num_tokens=shared_vocabulary(named, config.teacher.model) if named and section.vocabulary == "same" else None,
        chat_template=chat_template(config.teacher.model) if section.vocabulary == "uld" else None,
    )


def _build(config: Config, source: ModelSource, student: "Student", pool: Any, num_rows: int, device: str) -> tuple[Any, Any]:
    from ray_jobs.distillation.choose_loss import choose_loss
    from ray_jobs.distillation.hidden_states import prepare_hidden
    from ray_jobs.distillation.sources import Cache, Teacher, make_targets
    from ray_jobs.distillation.texts import text_loss
    from ray_jobs.training.models import skeleton

    section, model, shape = config.distill, student.load(device), skeleton(resolve_model(source.model))
    if section.targets == "text":
        return model, text_loss
    hidden, layers = prepare_hidden(model, shape, section.model_dump(), kept=student.start.layers, seed=config.run.seed)
    teacher = Teacher(*source, section.teacher_quantization, section.teacher_dtype, functools.partial(_load_teacher, config, source))
    sizes = {"ahead": section.pool.ahead, "num_rows": num_rows, "num_tokens": student.num_tokens}
    targets = make_targets(teacher, device=device, pool=pool, cache=Cache.of(section.cache), layers=layers, **sizes)
    names = {"student": student, "teacher": config.teacher.model, "max_length": model.config.max_position_embeddings}
    return model, choose_loss(section.model_dump(), targets, hidden, row_tokens=config.data.max_length, **names)


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
