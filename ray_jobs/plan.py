"""What will it cost? Memory per worker of each method and strategy, time and disk, from the model's config alone: no Ray, no weights."""

import logging
from typing import TYPE_CHECKING, Any

from ray_jobs.core.config import Config, DistillSection, FinetuneSection
from ray_jobs.core.errors import StageMissing
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.storage import Storage
from ray_jobs.judging.answers import read_answers

if TYPE_CHECKING:
    from ray_jobs.judging.openai_judge import ModelJudge
    from ray_jobs.training.alternatives import Limits, OverWorkers
    from ray_jobs.training.architecture import Architecture
    from ray_jobs.training.memory_plan import Memory, Request
    from ray_jobs.training.run_estimate import Estimate

GB = 10**9


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Return the memory of each way to train for one worker, whether it fits, and what the configured jobs take.

    A worker with a GPU is held to `[workers] gpu_memory` there and to `memory` on the host, one without to `memory`.

    Raises:
        ModelError: no config.json under the model's name.
        ConfigError: student layers, LoRA targets or a rank that the model cannot have.
    """
    del force  # nothing is kept
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return _plan(config) if config.distill.task == "language_model" else _encoder_plan(config)


def _plan(config: Config) -> dict[str, Any]:
    from ray_jobs.training.alternatives import methods, obstacle, over_workers, smallest_change
    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.fit_check import limits_of
    from ray_jobs.training.memory_plan import predict
    from ray_jobs.training.plan_table import row_of

    teacher, limits = find_architecture(config.teacher.model), limits_of(config.workers)
    jobs = {"finetune": _finetune(config, teacher), "distill": _distill(config, teacher)}
    rows = [row_of("base", memory, limits) for memory in _bases(config, teacher)]
    planned = {request.name: request for request in [*methods(jobs["finetune"]), jobs["finetune"]]}
    rows += [row_of("finetune", predict(request), limits) for request in planned.values()]
    rows.append(row_of("distill", predict(jobs["distill"]), limits))
    first = next((row["method"] for row in rows if row["job"] == "finetune" and row["fits"]), None)
    whole = jobs["finetune"]._replace(method="full")
    tables = {request.name: over_workers(request, limits) for request in (whole, jobs["finetune"])}
    chosen = {job: next(row for row in rows if row["job"] == job and row["method"] == request.name) for job, request in jobs.items()}
    estimates = {job: _estimate(config, job, request) for job, request in jobs.items()}
    facts = {job: _facts(request, limits, estimates[job]) for job, request in jobs.items()}
    changes = {job: smallest_change(request, limits) for job, request in jobs.items()}
    obstacles = {job: obstacle(request, limits) for job, request in jobs.items()}
    summary = {
        "stage": "plan",
        "model": config.teacher.model,
        "architecture": teacher.source,
        "limit_bytes": limits.limit,
        "host_limit_bytes": limits.host,
        "configured": jobs["finetune"].name,
        "first_that_fits": first,
        "rows": rows,
        "over_workers": {name: _over_workers(table) for name, table in tables.items()},
        **{
            job: {**found, "fits": chosen[job]["fits"], "smallest_change": changes[job], "obstacle": obstacles[job]}
            for job, found in facts.items()
        },
    }
    summary["distill"] |= (beside := _beside(config, teacher, jobs["distill"]))["facts"]
    lines = [*_introduction(config, teacher.source, limits), "", *_tables(rows, tables, limits, summary), ""]
    judged = _judges(config)
    lines += [*_verdicts(summary, chosen, estimates), *beside["lines"], *judged["lines"]]
    return {**summary, "judge": judged["plans"], "headline": lines, "next": _next(summary)}


def _encoder_plan(config: Config) -> dict[str, Any]:
    from ray_jobs.distillation.encoders.job import EncoderJob
    from ray_jobs.distillation.encoders.plan import plan_encoder, predict_encoder
    from ray_jobs.training.fit_check import limits_of
    from ray_jobs.training.plan_table import method_table, row_of

    student, section, limits = config.student.model_dump(), config.distill.model_dump(), limits_of(config.workers)
    job = EncoderJob.of(teacher=config.teacher.model, student=student, distill=section, seed=config.run.seed)
    job.check()
    request = job.memory_request(length=config.data.max_length, section=section, workers=config.workers)
    plan, row = plan_encoder(request, limits), row_of("distill", predict_encoder(request), limits)
    way_out = "" if plan.fits else f"; {plan.smallest_change}"
    lines = [
        f"plan: {job.words}, {section['micro_batch_size']} x {config.data.max_length} tokens at once",
        "",
        *method_table([row], first=None, configured=request.name),
        "",
        f"distill as configured ({request.name}): {plan.total / GB:.2f} GB, {'fits' if plan.fits else 'does not fit'}{way_out}",
    ]
    summary = {"stage": "plan", "model": config.teacher.model, "limit_bytes": plan.limit, "host_limit_bytes": plan.host_limit}
    summary |= {"rows": [row], "distill": {"fits": plan.fits, "smallest_change": plan.smallest_change}}
    return {**summary, "headline": lines, "next": "raystill run CONFIG" if plan.fits else "the same with --workers.memory"}


def _finetune(config: Config, teacher: "Architecture") -> "Request":
    from ray_jobs.training.fit_check import request_of

    section = config.finetune.model_dump()
    return request_of(section, settings=teacher.settings, length=config.data.max_length, workers=config.workers)


def _distill(config: Config, teacher: "Architecture") -> "Request":
    from ray_jobs.distillation.plan import distill_request
    from ray_jobs.distillation.student import student_settings
    from ray_jobs.training.architecture import find_architecture

    named = config.student.model
    return distill_request(
        config.distill.model_dump(),
        config.finetune.model_dump(),
        teacher=teacher.settings,
        student=find_architecture(named).settings if named else student_settings(teacher.config, config.student.layers),
        length=config.data.max_length,
        workers=config.workers,
        others=[find_architecture(each.model).settings for each in config.distill.teachers.values()],
    )


def _beside(config: Config, teacher: "Architecture", request: "Request") -> dict[str, Any]:
    from ray_jobs.distillation.plan import beside_workers

    section, prepared = config.distill, _manifest(RunFolder(config), "prepare")
    tokens = prepared["counts"]["label_tokens"] + prepared["counts"]["eval_label_tokens"] if prepared else None
    given = {"pool": section.pool.memory_bytes, "cache": section.cache.budget_bytes}
    return beside_workers(section.model_dump(), request, teacher=teacher.settings, tokens=tokens, given=given)


def _judges(config: Config) -> dict[str, Any]:
    """Plan the calls of the language models among the judges; without questions there is nothing to count yet."""
    from ray_jobs.judging.call_plan import games_to_plan, in_words, plan_calls
    from ray_jobs.judging.canaries import make_canaries

    section, run, models = config.judge, RunFolder(config), config.judge.model_judges()
    questions = _questions(config, run) if models else []
    if not questions:
        return {"plans": [], "lines": [f"judge {name}: calls are counted from the questions, and there are none yet" for name in models]}
    answers = _answers(config, run)
    games, canaries = games_to_plan(questions, answers, section.pairs), make_canaries(questions, section.canaries, seed=config.run.seed)
    replies, plans, lines = run.storage.sub("replies"), [], []
    for name, options in models.items():
        judge = _model_judge(config, name, replies)
        plan = plan_calls(
            judge,
            games=games,
            canaries=canaries,
            ledger=judge.ledger(replies),
            missing_answer_tokens=config.answer.max_new_tokens if answers is None else 0,
            **options.model_dump(include={"requests_per_minute", "tokens_per_minute", "backend"}),
        )
        plans.append(plan._asdict())
        lines += in_words(plan)
    return {"plans": plans, "lines": lines}


def _model_judge(config: Config, name: str, replies: Storage) -> "ModelJudge":
    """A model of our own is opened only where replies of one are kept: it takes a moment, or a download."""
    from ray_jobs.core.models import resolve_model
    from ray_jobs.distillation.identity import teacher_identity
    from ray_jobs.judging.openai_judge import ModelJudge
    from ray_jobs.judging.rubric import load_rubric

    options, rubric = config.judge.model_judges()[name], load_rubric(config.judge.rubric)
    is_kept = options.local is not None and bool(replies.sub("local").names())
    identity = teacher_identity(resolve_model(options.local or ""), dtype=config.answer.dtype) if is_kept else ""
    return ModelJudge.of(name, options.model_dump(), seed=config.run.seed, repeats=config.judge.repeats, rubric=rubric, identity=identity)


def _questions(config: Config, run: RunFolder) -> list[dict[str, Any]]:
    from ray_jobs.corpus.files import find_file
    from ray_jobs.corpus.pairs import READERS, read_questions

    if run.folder("prepare").exists("manifest.json"):
        return run.folder("prepare").read_jsonl("questions.jsonl")
    if config.data.questions is None:
        return []
    file = find_file(config.data.questions, suffixes=READERS, what="[data] questions")
    return [question.model_dump() for question in read_questions(file)]


def _answers(config: Config, run: RunFolder) -> dict[str, list[dict[str, Any]]] | None:
    """Return the answers to these questions; None where some are not there yet."""
    folder, made, prepared = run.folder("answer"), _manifest(run, "answer"), _manifest(run, "prepare")
    files = {model: f"{model}.parquet" for pair in config.judge.pairs for model in pair}
    are_these = made and prepared and made["inputs"].get("prepare") == prepared["id"] and all(map(folder.exists, files.values()))
    return read_answers(folder, files) if are_these else None


def _bases(config: Config, teacher: "Architecture") -> list["Memory"]:
    import torch

    from ray_jobs.training.memory_plan import plan_base

    return [plan_base(teacher.settings, dtype=dtype, device=config.workers.device) for dtype in (torch.float32, torch.float16)]


def _facts(request: "Request", limits: "Limits", estimate: "Estimate") -> dict[str, Any]:
    """Return what a configured job takes beside memory, and the most that would fit."""
    from ray_jobs.training.largest import largest_batch, largest_length

    return {
        "largest_micro_batch_size": largest_batch(request, limits.limit),
        "largest_max_length": largest_length(request, limits.limit),
        **estimate.facts,
    }


def _estimate(config: Config, job: str, request: "Request") -> "Estimate":
    from ray_jobs.training.recipe import Recipe
    from ray_jobs.training.run_estimate import Rate, estimate, measured_rate

    section: FinetuneSection | DistillSection = getattr(config, job)
    folder, workers = RunFolder(config), config.workers.min_workers
    prepared, before = (_manifest(folder, stage) for stage in ("prepare", job))
    given = Rate(section.tokens_per_s, "as given") if section.tokens_per_s else measured_rate(before, workers)
    return estimate(
        request,
        Recipe.of(section.model_dump(), seed=config.run.seed),
        num_rows=prepared["counts"]["train_rows"] if prepared else None,
        rate=given,
        keep_checkpoints=section.keep_checkpoints,
        export_dtype_bytes=request.work.dtype.itemsize if request.method == "full" else 4,
    )


def _manifest(folder: RunFolder, stage: str) -> dict[str, Any] | None:
    try:
        return folder.finished(stage)
    except StageMissing:
        return None


def _over_workers(table: list["OverWorkers"]) -> list[dict[str, Any]]:
    from ray_jobs.training.alternatives import WORKER_COUNTS

    return [
        {
            "strategy": row.sharding.name,
            "total": dict(zip(WORKER_COUNTS, (memory.total for memory in row.memories), strict=False)),
            "obstacle": row.obstacle,
        }
        for row in table
    ]


def _introduction(config: Config, source: str, limits: "Limits") -> list[str]:
    section, gpu = config.finetune, config.workers.gpus > 0
    memory = f"GPU worker of {config.workers.gpu_memory}" if gpu else f"CPU worker of {config.workers.memory}"
    worker = f"one {memory} = {limits.limit / GB:.2f} GB"
    host = f" and {limits.host / GB:.2f} GB of host memory" if gpu else ""
    shared = f", {config.workers.strategy} over {config.workers.min_workers} workers" if config.workers.min_workers > 1 else ""
    return [
        f"plan: {config.teacher.model} (architecture from {source}), {worker}{host}{shared}",
        f"finetune: {section.micro_batch_size} x {config.data.max_length} tokens at once"
        + (", activations recomputed" if section.gradient_checkpointing else "")
        + f"; distill: {config.distill.micro_batch_size} x {config.data.max_length}",
    ]


def _tables(rows: list[dict[str, Any]], tables: dict[str, list["OverWorkers"]], limits: "Limits", summary: dict[str, Any]) -> list[str]:
    from ray_jobs.training.plan_table import method_table, workers_table

    lines = method_table(rows, first=summary["first_that_fits"], configured=summary["configured"])
    for name, table in tables.items():
        lines += ["", *workers_table(name, table, limits)]
    return lines


def _verdicts(summary: dict[str, Any], chosen: dict[str, dict[str, Any]], estimates: dict[str, "Estimate"]) -> list[str]:
    lines = []
    for job, row in chosen.items():
        facts = summary[job]
        way_out = "" if row["fits"] else f"; {facts['smallest_change']}"
        if job == "finetune" and not row["fits"]:
            first = summary["first_that_fits"]
            way_out += f"; first that fits: {first}" if first else "; no method fits"
        lines += [
            f"{job} as configured ({row['method']}): {row['total'] / GB:.2f} GB, {'fits' if row['fits'] else 'does not fit'}{way_out}",
            *([f"  cannot start: {facts['obstacle']}"] if facts["obstacle"] else []),
            f"  largest micro_batch_size at this length: {facts['largest_micro_batch_size'] or 'none'}; "
            f"largest max_length at batch 1: {facts['largest_max_length'] or 'none'}",
            *(f"  {line}" for line in estimates[job].lines),
        ]
    return lines


def _next(summary: dict[str, Any]) -> str:
    starts = {job: summary[job]["fits"] and not summary[job]["obstacle"] for job in ("finetune", "distill")}
    if all(starts.values()):
        return "raystill run CONFIG"
    if starts["finetune"]:
        return "raystill prepare CONFIG, then raystill finetune CONFIG"
    return "the same with --workers.memory or --finetune.method"
