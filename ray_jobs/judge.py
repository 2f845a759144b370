"""Answers -> similarities and verdicts, by Ray Data."""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import SecretStr

from ray_jobs.core.cluster import RETRIES, connect, name_lost_workers, require
from ray_jobs.core.config import Config, JudgeSection
from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import resolve_model
from ray_jobs.core.progress import Bar, say
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.pairs import Game, make_games, verdict_row
from ray_jobs.judging.vectors import COURSE, Vectors, check_vectors, course_vectors, load_vectors

Row = dict[str, Any]
AFTER = ["prepare", "answer"]
GAMES_PER_BLOCK = 32
HOW_TO_CALL = ("max_concurrency", "max_retries", "timeout_s", "api_key_env", "requests_per_minute", "tokens_per_minute", "backend")


class Verdicts(NamedTuple):
    """What one judge said: its name in the rows, the rows, and facts for the manifest."""

    judge: str
    rows: list[Row]
    facts: Row


def check(config: Config) -> None:
    """Check what can be checked before any stage runs.

    Raises:
        ConfigError: no pairs, a pair names a model that does not answer, or the judge's key is not in the environment.
        ModelError: the word vectors or the coverage judge's encoder do not exist.
    """
    if not config.judge.pairs:
        raise ConfigError('[judge] pairs is empty: name at least one, like [["base", "teacher"]]')
    for model in sorted({model for pair in config.judge.pairs for model in pair}):
        if model not in config.answer.models:
            raise ConfigError(
                f"[judge] pairs name {model!r}, but [answer] models are {config.answer.models}: add it there or drop the pair"
            )
    for a, b in config.judge.pairs:
        if a == b:
            raise ConfigError(f"[judge] pairs let {a!r} meet itself: name two models")
    check_vectors(config.judge.vectors)
    if "coverage" in config.judge.judges:
        resolve_model(config.judge.coverage_model)
    if "openai" in config.judge.judges and not RunFolder(config).folder("judge").exists("manifest.json"):
        _api_key(config.judge)


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Score and judge the answers of a run and return the stage's manifest.

    Raises:
        StageMissing: questions or answers are not there yet.
        EndpointError: no call to the judge's endpoint can succeed.
    """
    check(config)
    folder = RunFolder(config)
    for earlier in AFTER:
        folder.finished(earlier)
    questions = folder.folder("prepare").read_jsonl("questions.jsonl")
    models = dict.fromkeys(model for pair in config.judge.pairs for model in pair)
    answers = {model: folder.folder("answer").read_parquet(f"{model}.parquet") for model in models}
    games = make_games(questions, answers, config.judge.pairs)
    vectors = _vectors(config, folder)
    facts = {"vectors_sha256": vectors.sha256}
    stage = folder.stage("judge", sections=_deciding_fields(config), after=AFTER, force=force, facts=facts)
    if stage.manifest:
        say("judge: done already")
        return stage.manifest
    similarities, scale = _similarities(config.judge, vectors, questions, [row for rows in answers.values() for row in rows])
    with connect():
        judged = [_JUDGES[name](config, games, Ledger(folder.storage.sub("replies"))) for name in config.judge.judges]
    verdicts = [row for found in judged for row in found.rows]
    stage.folder.write_parquet("similarities.parquet", similarities)
    stage.folder.write_parquet("verdicts.parquet", verdicts)
    return stage.finish(**_facts(config, judged, verdicts, similarities, scale), next="raystill report CONFIG")


def _deciding_fields(config: Config) -> list[str]:
    fields = [f"judge.{name}" for name in type(config.judge).model_fields if name != "openai"]
    if "openai" in config.judge.judges:
        fields += [f"judge.openai.{name}" for name in type(config.judge.openai).model_fields if name not in HOW_TO_CALL]
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


def _by_coverage(config: Config, games: list[Game], _: Ledger) -> Verdicts:
    from ray_jobs.judging.workers import CoverageWorker

    section, workers = config.judge, config.workers
    require("[workers] of judge", {"CPU": workers.cpus}, workers.max_workers)
    options = {
        "model": section.coverage_model,
        "num_threads": max(1, int(workers.cpus)),
        "threshold": section.coverage_threshold,
        "margin": section.coverage_margin,
    }
    rows = []
    with Bar("judge coverage", "game") as bar:
        for row in _map(
            [game._asdict() for game in games],
            CoverageWorker,
            options,
            block_rows=GAMES_PER_BLOCK,
            num_cpus=workers.cpus,
            size=workers.max_workers,
        ):
            rows.append(row)
            bar(len(rows), len(games))
    place = {(game.question_id, game.model_a, game.model_b, game.swapped): i for i, game in enumerate(games)}
    rows.sort(key=lambda row: place[row["question_id"], row["model_a"], row["model_b"], row["swapped"]])
    return Verdicts("coverage", rows, {"model": section.coverage_model, "rubric_sha": rows[0]["rubric_sha"] if rows else None})


def _by_openai(config: Config, games: list[Game], ledger: Ledger) -> Verdicts:
    from ray_jobs.judging import openai_judge
    from ray_jobs.judging.calls import Budget, EndpointOptions, Limits, Prices
    from ray_jobs.judging.ray_calls import ask

    options = config.judge.openai
    calls = openai_judge.make_calls(
        games,
        model=options.model,
        base_url=options.base_url,
        max_tokens=options.max_tokens,
        seed=config.run.seed,
        structured=options.structured,
    )
    prices = Prices(options.usd_per_million_prompt_tokens, options.usd_per_million_completion_tokens)
    limits = Limits(options.requests_per_minute, options.tokens_per_minute, options.max_concurrency)
    endpoint = EndpointOptions(_api_key(config.judge), options.base_url, options.timeout_s, options.max_retries, options.backend)
    asked = ask(
        list(calls.values()),
        endpoint=endpoint,
        ledger=ledger,
        limits=limits,
        budget=Budget(config.judge.budget_usd, config.judge.max_calls),
        prices=prices,
        num_callers=config.judge.num_callers,
        title="judge openai",
    )
    name, sha = f"openai:{options.model}", openai_judge.rubric_sha(options.model)
    rows = []
    for game in games:
        ruling = openai_judge.rule(game, asked.replies.get(calls[game].key) if game in calls else None, prices)
        rows.append(verdict_row(game, ruling, judge=name, rubric_sha=sha))
    counts = {**asked.counters._asdict(), "stopped": asked.stopped, "settled_by_rule": len(games) - len(calls)}
    return Verdicts(name, rows, {"model": options.model, "base_url": options.base_url, "rubric_sha": sha, **counts})


_JUDGES = {"coverage": _by_coverage, "openai": _by_openai}


def _map(rows: list[Row], worker: type, options: Row, *, block_rows: int, num_cpus: float, size: int) -> Iterator[Row]:
    """Yield what a pool of actors makes of rows, in no order. Rows travel as JSON: no type is guessed from what is None."""
    import ray

    items = [{"row": json.dumps(row)} for row in rows]
    dataset = ray.data.from_items(items, override_num_blocks=max(1, -(-len(items) // block_rows)))
    pool = ray.data.ActorPoolStrategy(size=size)
    mapped = dataset.map_batches(
        worker, fn_constructor_kwargs=options, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus, compute=pool, **RETRIES
    )
    with name_lost_workers(f"judge ({worker.__name__})"):
        for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from map(json.loads, batch["row"].to_pylist())


def _api_key(section: JudgeSection) -> SecretStr:
    name = section.openai.api_key_env
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"the openai judge reads its key from the environment variable {name}, which is not set: set it, or use judges = ['coverage']"
        )
    return SecretStr(key)


def _facts(config: Config, judged: list[Verdicts], verdicts: list[Row], similarities: list[Row], scale: Row) -> Row:
    from ray_jobs.judging.results import compare_models, describe_judge, pair_headline, rank_models

    names = [found.judge for found in judged]
    seed, tie_bands = config.run.seed, {metric: told["tie_band"] for metric, told in scale["scales"].items()}
    results = compare_models(config.judge.pairs, names, verdicts, similarities, tie_bands=tie_bands, seed=seed)
    unscored = [row for row in similarities if row["cosine"] is None]
    headline = [f"judge: {pair_headline(entry)}" for entry in results]
    if unscored:
        share = f"fewer than {config.judge.min_known_share:.0%} of their words or their sample answer's have a vector"
        headline.append(
            f"judge: {len(unscored)} of {len(similarities)} answers have no similarity ({share}, or they are empty): not counted"
        )
    counts = {
        "similarities": len(similarities),
        "similarities_unscored": len(unscored),
        "verdicts": len(verdicts),
        "verdicts_unscored": sum(row["winner"] is None for row in verdicts),
    }
    cards = {name: describe_judge(verdicts, name, similarities, seed=seed) for name in names}
    headline += [f"judge: {name} is {card['usability']['word']}: {'; '.join(card['usability']['reasons'])}" for name, card in cards.items()]
    judges = [{"name": found.judge, **found.facts, "card": cards[found.judge]} for found in judged]
    ranking = {name: rank_models(verdicts, name, seed=seed) for name in names}
    return {"counts": counts, "judges": judges, "similarity": scale, "pairs": results, "ranking": ranking, "headline": headline}
