"""Answers -> similarities and verdicts, by Ray Data."""

import functools
from typing import Any

from pydantic import SecretStr

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config, JudgeSection
from ray_jobs.core.config_judge import ModelJudgeSection
from ray_jobs.core.errors import StageMissing
from ray_jobs.core.models import resolve_model
from ray_jobs.core.progress import Bar, say
from ray_jobs.core.records import OFFLINE
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.files import find_file
from ray_jobs.corpus.ray_data import each
from ray_jobs.judging.answers import read_answers
from ray_jobs.judging.api_key import read_api_key
from ray_jobs.judging.by_model import judge_by_model
from ray_jobs.judging.calls import Asked, Budget, Call, EndpointOptions, Limits
from ray_jobs.judging.canaries import Canary, make_canaries
from ray_jobs.judging.course_vectors import course_texts
from ray_jobs.judging.deciding import deciding_fields
from ray_jobs.judging.imports import SUFFIXES, Imported, check_name, read_import
from ray_jobs.judging.judged import Judged, account, could_go_on, with_jury
from ray_jobs.judging.local_judge import LocalWorker, ask_locally
from ray_jobs.judging.openai_judge import ModelJudge
from ray_jobs.judging.pairs import Game, check_pairs, make_games
from ray_jobs.judging.prices import check_priced
from ray_jobs.judging.rubric import Rubric, load_rubric
from ray_jobs.judging.scales import with_tie_band
from ray_jobs.judging.vectors import COURSE, Vectors, check_vectors, course_vectors, load_vectors

Row = dict[str, Any]
AFTER = ["prepare", "answer"]


def check(config: Config) -> None:
    """Check what can be checked before any stage runs.

    Raises:
        ConfigError: no pairs, a pair names a model that does not answer, a judge's key is not in the environment, a rubric without its
            placeholders, a budget in dollars without a price.
        DataError: a file of verdicts from elsewhere, or the rubric's, does not exist.
        ModelError: the word vectors, the coverage judge's encoder or a local judge does not exist.
    """
    section = config.judge
    check_pairs(section.pairs, answering=config.answer.models)
    check_vectors(section.vectors)
    if OFFLINE in section.judges:
        resolve_model(section.coverage_model)
    rubric = load_rubric(section.rubric)
    for name in section.imports:
        check_name(name)
        _import_file(section, name)
    for name, options in section.model_judges().items():
        if options.local is not None:
            resolve_model(options.local)
            continue
        place = f" at {options.base_url}" if options.base_url else ""
        prices = _model_judge(config, name, rubric).prices
        check_priced(prices, judge=f"{name!r} ({options.model!r}{place})", budget_usd=section.budget_usd)
    if not RunFolder(config).folder("judge").exists("manifest.json"):
        _check_keys(section)


def _answers(section: JudgeSection, answered: Storage) -> dict[str, list[Row]]:
    models = dict.fromkeys(model for pair in section.pairs for model in pair)
    for model in models:
        if not answered.exists(f"{model}.parquet"):
            raise StageMissing(f"{answered.uri} has no answers of {model!r}: let it answer too with `raystill answer CONFIG --force`")
    return read_answers(answered, models)


def _check_keys(section: JudgeSection) -> None:
    for name, options in section.model_judges().items():
        if options.local is None:
            _api_key(name, options)


def run(config: Config, *, force: bool) -> Row:
    """Score and judge the answers of a run and return the stage's manifest.

    Raises:
        StageMissing: questions, or the answers of a model, are not there yet.
        DataError: answers without their questions or of another schema, or a file of verdicts that does not fit the run.
        EndpointError: no call to a judge's endpoint can succeed.
    """
    check(config)
    folder, section = RunFolder(config), config.judge
    for earlier in AFTER:
        folder.finished(earlier)
    questions = folder.folder("prepare").read_jsonl("questions.jsonl")
    answers = _answers(section, folder.folder("answer"))
    games = make_games(questions, answers, section.pairs)
    imported = _imports(section, games)
    vectors, rubric = _vectors(config, folder), load_rubric(section.rubric)
    settings = _settings(section, vectors, rubric, imported)
    stage = folder.stage("judge", force=force, **settings)
    if stage.manifest and could_go_on(stage.manifest, budget_usd=section.budget_usd, max_calls=section.max_calls):
        _check_keys(section)
        stage = folder.stage("judge", force=True, **settings)
    if stage.manifest:
        say("judge: done already")
        return stage.manifest
    similarities, scale = _similarities(section, vectors, questions, [row for rows in answers.values() for row in rows])
    canaries = make_canaries(questions, section.canaries, seed=config.run.seed)
    with connect():
        judged = [_judge(config, name, games, canaries, rubric, folder.storage.sub("replies")) for name in section.judges]
    judged = with_jury(judged) + [Judged(name, found.rows, found.facts) for name, found in imported.items()]
    stage.folder.write_parquet("similarities.parquet", similarities)
    stage.folder.write_parquet("verdicts.parquet", [row for found in judged for row in found.rows])
    stage.folder.write_jsonl("canaries.jsonl", [row for found in judged for row in found.canaries])
    told = account(
        judged,
        similarities,
        pairs=section.pairs,
        tie_bands={metric: told["tie_band"] for metric, told in scale["scales"].items()},
        seed=config.run.seed,
        min_known_share=section.min_known_share,
        makers=makers_of(config),
    )
    budget = {"usd": section.budget_usd, "calls": section.max_calls, "stopped": [found.stopped for found in judged if found.stopped]}
    return stage.finish(**told, similarity=scale, budget=budget, next="raystill report CONFIG")


def _settings(section: JudgeSection, vectors: Vectors, rubric: Rubric, imported: dict[str, Imported]) -> Row:
    judges = section.model_judges()
    facts = {"vectors_sha256": vectors.sha256, "imports": {name: found.sha256 for name, found in imported.items()}}
    facts |= {"rubric": rubric.sha} if judges else {}
    return {"sections": deciding(section), "after": AFTER, "facts": facts}


def deciding(section: JudgeSection) -> list[str]:
    """Return the dotted fields with which a finished stage was made for good."""
    return deciding_fields(type(section).model_fields, judges=section.model_judges(), judge_fields=ModelJudgeSection.model_fields)


def makers_of(config: Config) -> list[str]:
    """Return the models whose words the judged ones may have learnt."""
    distill, is_text = config.distill, config.distill.targets == "text" and config.distill.text.model != "teacher"
    of_student = [config.student.model, *(other.model for other in distill.teachers.values()), distill.text.model if is_text else None]
    has_student = any("student" in pair for pair in config.judge.pairs)
    return [config.teacher.model, *(name for name in of_student if name and has_student)]


def _similarities(section: JudgeSection, vectors: Vectors, questions: list[Row], answers: list[Row]) -> tuple[list[Row], Row]:
    """Score on the driver: a thousand answers take a second, less than a worker takes to start."""
    from ray_jobs.judging.similarity import score_answers

    rows, scales = score_answers(questions, answers, vectors.keyed, min_known_share=section.min_known_share)
    told = {metric: with_tie_band(scale, section.tie_band) for metric, scale in scales.items()}
    facts = {"vectors": section.vectors, "vectors_sha256": vectors.sha256, **told["cosine"], "scales": told}
    return [row.model_dump() for row in rows], facts


def _vectors(config: Config, folder: RunFolder) -> Vectors:
    if config.judge.vectors != COURSE:
        return load_vectors(config.judge.vectors)
    texts = course_texts(folder.folder("prepare"))
    say(f"judge: word vectors of the course, trained where this cache has none ({len(texts)} texts)")
    return course_vectors(texts, seed=config.run.seed)


def _import_file(section: JudgeSection, name: str) -> bytes:
    return find_file(section.imports[name], suffixes=SUFFIXES, what=f"[judge.imports] {name}").read()


def _imports(section: JudgeSection, games: list[Game]) -> dict[str, Imported]:
    return {name: read_import(_import_file(section, name), name=file, judge=name, games=games) for name, file in section.imports.items()}


def _model_judge(config: Config, name: str, rubric: Rubric) -> ModelJudge:
    options = config.judge.model_judges()[name]
    identity = _identity(options.local, config.answer.dtype) if options.local else ""
    return ModelJudge.of(name, options.model_dump(), seed=config.run.seed, repeats=config.judge.repeats, rubric=rubric, identity=identity)


def _identity(model: str, dtype: str) -> str:
    from ray_jobs.distillation.identity import teacher_identity

    return teacher_identity(resolve_model(model), dtype=dtype)


def _judge(config: Config, name: str, games: list[Game], canaries: list[Canary], rubric: Rubric, replies: Storage) -> Judged:
    if name == OFFLINE:
        return _by_coverage(config, games)
    judge, options = _model_judge(config, name, rubric), config.judge.model_judges()[name]
    ask = _ask_local if judge.is_local else _ask_endpoint
    return judge_by_model(judge, games, canaries, ask=functools.partial(ask, config, options, judge, replies))


def _by_coverage(config: Config, games: list[Game]) -> Judged:
    from ray_jobs.judging.by_coverage import CoverageWorker, judge_by_coverage

    section, workers = config.judge, config.workers
    require("[workers] of judge", {"CPU": workers.cpus}, workers.max_workers)
    arguments = {
        "model": section.coverage_model,
        "num_threads": max(1, int(workers.cpus)),
        "threshold": section.coverage_threshold,
        "margin": section.coverage_margin,
    }
    pool = {"bundle": {"CPU": workers.cpus}, "num_workers": workers.max_workers}
    work = functools.partial(each, kind=CoverageWorker, arguments=arguments, **pool)
    with Bar("judge coverage", "game") as bar:
        return judge_by_coverage(games, model=section.coverage_model, work=work, on_progress=bar)


def _ask_endpoint(config: Config, options: ModelJudgeSection, judge: ModelJudge, replies: Storage, calls: list[Call]) -> Asked:
    from ray_jobs.judging.ray_calls import ask

    section, key = config.judge, _api_key(judge.name, options)
    return ask(
        calls,
        endpoint=EndpointOptions(key, options.base_url, options.timeout_s, options.max_retries, options.backend),
        ledger=judge.ledger(replies),
        limits=Limits(options.requests_per_minute, options.tokens_per_minute, options.max_concurrency),
        budget=Budget(section.budget_usd, section.max_calls) if section.budget_usd or section.max_calls else None,
        prices=judge.prices,
        num_callers=section.num_callers,
        title=f"judge {judge.label}",
    )


def _ask_local(config: Config, options: ModelJudgeSection, judge: ModelJudge, replies: Storage, calls: list[Call]) -> Asked:
    from ray_jobs.training.memory import memory_limit
    from serve.engines import open_engine

    workers, num_actors, ledger = config.workers, config.answer.num_actors, judge.ledger(replies)
    device = {"dtype": config.answer.dtype, "device": "cuda" if workers.gpus else "cpu", "num_threads": max(1, int(workers.cpus))}
    arguments = {
        "make_engine": functools.partial(open_engine, options.local, **device),
        "ledger": ledger,
        "guard": functools.partial(memory_limit, workers.memory_bytes),
    }
    require(f"judge {judge.label}", workers.bundle, num_actors)
    work = functools.partial(each, kind=LocalWorker, arguments=arguments, bundle=workers.bundle, num_workers=num_actors)
    with Bar(f"judge {judge.label}", "call") as bar:
        return ask_locally(calls, model=judge.model, ledger=ledger, batch_size=config.answer.batch_size, work=work, on_progress=bar)


def _api_key(name: str, options: ModelJudgeSection) -> SecretStr:
    return read_api_key(f"judge {name!r}", variable=options.api_key_env, otherwise=", or use judges = ['coverage']")
