"""Answers -> similarities and verdicts, by Ray Data."""

import functools
import hashlib
import os
from typing import Any

from pydantic import SecretStr

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config, JudgeSection
from ray_jobs.core.config_judge import OFFLINE, ModelJudgeSection
from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import resolve_model
from ray_jobs.core.progress import Bar, say
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.files import find_file
from ray_jobs.corpus.ray_data import each
from ray_jobs.judging.calls import Asked, Budget, Call, EndpointOptions, Limits
from ray_jobs.judging.canaries import Canary, canary_rows, make_canaries
from ray_jobs.judging.imports import SUFFIXES, Imported, read_import
from ray_jobs.judging.judged import Judged, account, asked_share, could_go_on, members_of
from ray_jobs.judging.jury import JURY, jury_rows
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.local_judge import LocalWorker, ask_locally
from ray_jobs.judging.openai_judge import ModelJudge, in_turn
from ray_jobs.judging.pairs import Game, make_games
from ray_jobs.judging.prices import are_known
from ray_jobs.judging.results import METRICS
from ray_jobs.judging.rubric import Rubric, load_rubric
from ray_jobs.judging.vectors import COURSE, Vectors, check_vectors, course_vectors, load_vectors

Row = dict[str, Any]
AFTER = ["prepare", "answer"]
GAMES_PER_BATCH = 32
HOW_TO_CALL = {"max_concurrency", "max_retries", "timeout_s", "api_key_env", "requests_per_minute", "tokens_per_minute", "backend"}
"""Fields of a language-model judge that change no verdict."""
NOT_DECIDING = {"openai", "jury", "num_callers", "budget_usd", "max_calls", "rubric", "imports"}
"""Fields of [judge] that change no verdict, or that decide by the content of a file or by the fields of their tables."""


def check(config: Config) -> None:
    """Check what can be checked before any stage runs.

    Raises:
        ConfigError: no pairs, a pair names a model that does not answer, a judge's key is not in the environment, a rubric without its
            placeholders, a budget in dollars without a price.
        DataError: a file of verdicts from elsewhere, or the rubric's, does not exist.
        ModelError: the word vectors, the coverage judge's encoder or a local judge does not exist.
    """
    section = config.judge
    if not section.pairs:
        raise ConfigError('[judge] pairs is empty: name at least one, like [["base", "teacher"]]')
    for model in sorted({model for pair in section.pairs for model in pair}):
        if model not in config.answer.models:
            raise ConfigError(
                f"[judge] pairs name {model!r}, but [answer] models are {config.answer.models}: add it there or drop the pair"
            )
    for a, b in section.pairs:
        if a == b:
            raise ConfigError(f"[judge] pairs let {a!r} meet itself: name two models")
    check_vectors(section.vectors)
    if OFFLINE in section.judges:
        resolve_model(section.coverage_model)
    _check_judges(config)


def _check_judges(config: Config) -> None:
    section, rubric = config.judge, load_rubric(config.judge.rubric)
    for name in section.imports:
        if name in {JURY, *METRICS}:
            raise ConfigError(f"[judge] imports has a judge {name!r}, as the jury or a metric is called: give it another name")
        _import_file(section, name)
    is_done = RunFolder(config).folder("judge").exists("manifest.json")
    for name, options in section.model_judges().items():
        if options.local is not None:
            resolve_model(options.local)
            continue
        if section.budget_usd is not None and not are_known(_model_judge(config, name, options, rubric).prices):
            raise ConfigError(
                f"budget_usd = {section.budget_usd:g} cannot be kept: the price of judge {name!r} ({options.model!r}"
                f"{f' at {options.base_url}' if options.base_url else ''}) is unknown; set its usd_per_million_prompt_tokens and "
                "usd_per_million_completion_tokens, or use max_calls"
            )
        if not is_done:
            _api_key(name, options)


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Score and judge the answers of a run and return the stage's manifest.

    Raises:
        StageMissing: questions or answers are not there yet.
        DataError: answers without their questions, or a file of verdicts that does not fit the run.
        EndpointError: no call to a judge's endpoint can succeed.
    """
    check(config)
    folder, section = RunFolder(config), config.judge
    for earlier in AFTER:
        folder.finished(earlier)
    questions = folder.folder("prepare").read_jsonl("questions.jsonl")
    models = dict.fromkeys(model for pair in section.pairs for model in pair)
    answers = {model: folder.folder("answer").read_parquet(f"{model}.parquet") for model in models}
    games = make_games(questions, answers, section.pairs)
    imported, import_shas = _imports(section, games)
    vectors, rubric = _vectors(config, folder), load_rubric(section.rubric)
    facts = {"vectors_sha256": vectors.sha256, "imports": import_shas, **({"rubric": rubric.sha} if section.model_judges() else {})}
    settings = {"sections": _deciding_fields(config), "after": AFTER, "facts": facts}
    stage = folder.stage("judge", force=force, **settings)
    if stage.manifest and could_go_on(stage.manifest, budget_usd=section.budget_usd, max_calls=section.max_calls):
        for name, options in section.model_judges().items():
            _api_key(name, options)
        stage = folder.stage("judge", force=True, **settings)
    if stage.manifest:
        say("judge: done already")
        return stage.manifest
    similarities, scale = _similarities(section, vectors, questions, [row for rows in answers.values() for row in rows])
    canaries = make_canaries(questions, section.canaries, seed=config.run.seed)
    with connect():
        judged = [_judge(config, name, games, canaries, rubric, folder.storage.sub("replies")) for name in section.judges]
    judged += _jury(judged)
    judged += [Judged(name, found.rows, found.facts) for name, found in imported.items()]
    stage.folder.write_parquet("similarities.parquet", similarities)
    stage.folder.write_parquet("verdicts.parquet", [row for found in judged for row in found.rows])
    stage.folder.write_jsonl("canaries.jsonl", [row for found in judged for row in found.canaries])
    tie_bands = {metric: told["tie_band"] for metric, told in scale["scales"].items()}
    told = account(
        judged,
        similarities,
        pairs=section.pairs,
        tie_bands=tie_bands,
        seed=config.run.seed,
        min_known_share=section.min_known_share,
        makers=_makers(config),
    )
    budget = {"usd": section.budget_usd, "calls": section.max_calls, "stopped": [found.stopped for found in judged if found.stopped]}
    return stage.finish(**told, similarity=scale, budget=budget, next="raystill report CONFIG")


def _makers(config: Config) -> list[str]:
    """The models whose words the judged ones may have learnt."""
    distill, is_text = config.distill, config.distill.targets == "text" and config.distill.text.model != "teacher"
    of_student = [config.student.model, *(other.model for other in distill.teachers.values()), distill.text.model if is_text else None]
    has_student = any("student" in pair for pair in config.judge.pairs)
    return [config.teacher.model, *(name for name in of_student if name and has_student)]


def _deciding_fields(config: Config) -> list[str]:
    fields = [f"judge.{name}" for name in type(config.judge).model_fields if name not in NOT_DECIDING]
    for name in config.judge.model_judges():
        table = "judge.openai" if name == "openai" else f"judge.jury.{name}"
        fields += [f"{table}.{field}" for field in ModelJudgeSection.model_fields if field not in HOW_TO_CALL]
    return fields


def _similarities(section: JudgeSection, vectors: Vectors, questions: list[Row], answers: list[Row]) -> tuple[list[Row], Row]:
    """Score on the driver: a thousand answers take a second, less than a worker takes to start."""
    from ray_jobs.judging.similarity import score_answers

    rows, scales = score_answers(questions, answers, vectors.keyed, min_known_share=section.min_known_share)
    told = {metric: {**scale._asdict(), "tie_band": section.tie_band * scale.spread} for metric, scale in scales.items()}
    facts = {"vectors": section.vectors, "vectors_sha256": vectors.sha256, **told["cosine"], "scales": told}
    return [row.model_dump() for row in rows], facts


def _vectors(config: Config, folder: RunFolder) -> Vectors:
    if config.judge.vectors != COURSE:
        return load_vectors(config.judge.vectors)
    prepared = folder.folder("prepare")
    chunks = prepared.read_parquet("chunks.parquet") if prepared.exists("chunks.parquet") else []
    pairs = prepared.read_jsonl("pairs.jsonl") if prepared.exists("pairs.jsonl") else []
    texts = [row["text"] for row in chunks] + [row[key] for row in pairs for key in ("question", "answer")]
    say(f"judge: word vectors of the course, trained where this cache has none ({len(texts)} texts)")
    return course_vectors(texts, seed=config.run.seed)


def _import_file(section: JudgeSection, name: str) -> bytes:
    return find_file(section.imports[name], suffixes=SUFFIXES, what=f"[judge.imports] {name}").read()


def _imports(section: JudgeSection, games: list[Game]) -> tuple[dict[str, Imported], dict[str, str]]:
    contents = {name: _import_file(section, name) for name in section.imports}
    found = {name: read_import(content, name=section.imports[name], judge=name, games=games) for name, content in contents.items()}
    return found, {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _judge(config: Config, name: str, games: list[Game], canaries: list[Canary], rubric: Rubric, replies: Storage) -> Judged:
    if name == OFFLINE:
        return _by_coverage(config, games)
    return _by_model(config, name, games, canaries, rubric, replies)


def _by_coverage(config: Config, games: list[Game]) -> Judged:
    from ray_jobs.judging.workers import CoverageWorker

    section, workers = config.judge, config.workers
    require("[workers] of judge", {"CPU": workers.cpus}, workers.max_workers)
    options = {
        "model": section.coverage_model,
        "num_threads": max(1, int(workers.cpus)),
        "threshold": section.coverage_threshold,
        "margin": section.coverage_margin,
    }
    batches = [{"games": [game._asdict() for game in games[i : i + GAMES_PER_BATCH]]} for i in range(0, len(games), GAMES_PER_BATCH)]
    rows: list[Row] = []
    with Bar("judge coverage", "game") as bar:
        for result in each(batches, CoverageWorker, options, bundle={"CPU": workers.cpus}, num_workers=workers.max_workers):
            rows += result["verdicts"]
            bar(len(rows), len(games))
    place = {(game.question_id, game.model_a, game.model_b, game.swapped): i for i, game in enumerate(games)}
    rows.sort(key=lambda row: place[row["question_id"], row["model_a"], row["model_b"], row["swapped"]])
    return Judged("coverage", rows, {"model": section.coverage_model, "rubric_sha": rows[0]["rubric_sha"] if rows else None})


def _model_judge(config: Config, name: str, options: ModelJudgeSection, rubric: Rubric) -> ModelJudge:
    from ray_jobs.distillation.identity import teacher_identity

    identity = teacher_identity(resolve_model(options.local), dtype=config.answer.dtype) if options.local else ""
    return ModelJudge.of(name, options.model_dump(), seed=config.run.seed, repeats=config.judge.repeats, rubric=rubric, identity=identity)


def _by_model(config: Config, name: str, games: list[Game], canaries: list[Canary], rubric: Rubric, replies: Storage) -> Judged:
    options = config.judge.model_judges()[name]
    judge = _model_judge(config, name, options, rubric)
    mine, planted = judge.games(games), [canary.game for canary in canaries]
    calls = judge.calls([*mine, *planted])
    ask = _ask_local if options.local else _ask_endpoint
    in_order = [calls[game] for game in [*planted, *in_turn(mine, seed=judge.seed)] if game in calls]
    asked = ask(config, judge, options, in_order, judge.ledger(replies))
    rows = judge.verdicts(judge.rulings(mine, calls, asked))
    facts = {
        **judge.facts,
        "base_url": options.base_url,
        "settled_by_rule": len(mine) + len(planted) - len(calls),
        "coverage": asked_share(rows),
        "flagged": sum(bool(row["flag"]) for row in rows),
        "stopped": asked.stopped,
        "answered_as": asked.models,
        "calls": asked.counters._asdict(),
    }
    found = canary_rows(canaries, judge.rulings(planted, calls, asked), judge=judge.label)
    return Judged(judge.label, rows, facts, found, is_model=True, stopped=asked.stopped)


def _ask_endpoint(config: Config, judge: ModelJudge, options: ModelJudgeSection, calls: list[Call], ledger: Ledger) -> Asked:
    from ray_jobs.judging.ray_calls import ask

    section = config.judge
    return ask(
        calls,
        endpoint=EndpointOptions(_api_key(judge.name, options), options.base_url, options.timeout_s, options.max_retries, options.backend),
        ledger=ledger,
        limits=Limits(options.requests_per_minute, options.tokens_per_minute, options.max_concurrency),
        budget=Budget(section.budget_usd, section.max_calls) if section.budget_usd or section.max_calls else None,
        prices=judge.prices,
        num_callers=section.num_callers,
        title=f"judge {judge.label}",
    )


def _ask_local(config: Config, judge: ModelJudge, options: ModelJudgeSection, calls: list[Call], ledger: Ledger) -> Asked:
    from ray_jobs.training.memory import memory_limit
    from serve.engines import open_engine

    workers, num_actors = config.workers, config.answer.num_actors
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


def _jury(judged: list[Judged]) -> list[Judged]:
    members = members_of(judged)
    rows = jury_rows([row for found in judged for row in found.rows], members)
    return [Judged(JURY, rows, {"members": members, "rubric_sha": rows[0]["rubric_sha"]})] if rows else []


def _api_key(name: str, options: ModelJudgeSection) -> SecretStr:
    key = os.environ.get(options.api_key_env)
    if not key:
        raise ConfigError(
            f"judge {name!r} reads its key from the environment variable {options.api_key_env}, which is not set: set it, "
            "or use judges = ['coverage']"
        )
    return SecretStr(key)
