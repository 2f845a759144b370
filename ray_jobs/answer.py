"""questions -> answers of each model (Ray Data, batched generation, one model load an actor)."""

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config
from ray_jobs.core.errors import ConfigError, DataError, JobError
from ray_jobs.core.memory import peak_bytes, reset_peak
from ray_jobs.core.progress import Bar, say
from ray_jobs.core.records import Answer, content_id
from ray_jobs.core.run_folder import MODEL_STAGES, RunFolder
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.ray_data import each
from ray_jobs.corpus.template import chat_messages
from ray_jobs.training.memory import memory_limit

if TYPE_CHECKING:
    from serve.engines import Completion, Engine

PARTS = "parts"
Row = dict[str, Any]


def check(config: Config) -> None:
    """Refuse at once what could only fail later.

    Raises:
        ConfigError: no model is to answer.
        DataError: there are no questions.
    """
    if not config.answer.models:
        raise ConfigError("[answer] models = []: name at least one of base, teacher, student")
    if config.data.questions is None and not config.run.stages_from:
        raise DataError("[data] questions is not set: give a file of evaluation questions with `question` and `reference`")


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Answer the run's questions with each model and return the stage's manifest.

    Raises:
        StageMissing: the questions or a model are not there yet.
        DataError: the run has no questions.
        JobError: a model answered no question at all.
    """
    check(config)
    folder, section = RunFolder(config), config.answer
    models = list(dict.fromkeys(section.models))
    needed = ["prepare", *(stage for model in models for stage in MODEL_STAGES[model])]
    deciding = ["models", "max_new_tokens", "sampling_temperature", "batch_size", "dtype"]
    sections = ["teacher", "data.system_prompt", *(f"answer.{field}" for field in deciding)]
    for stage_name in needed:
        folder.finished(stage_name)
    questions = folder.folder("prepare").read_jsonl("questions.jsonl")
    if not questions:
        raise DataError("the run has no questions: set [data] questions and run `raystill prepare CONFIG --force`")
    stage = folder.stage("answer", sections=sections, after=needed, force=force)
    if stage.manifest:
        say("answer: done already")
        return stage.manifest
    batches = make_batches(questions, size=section.batch_size, system_prompt=config.data.system_prompt, seed=config.run.seed)
    work = [{"model": model, **batch} for model in models for batch in batches]
    with connect():
        require("answer", config.workers.bundle, section.num_actors)
        made = _answer(config, folder, stage.folder.sub(PARTS), work)
    counts = {model: _write_table(model, made, questions, stage.folder) for model in models}
    manifest = stage.finish(counts=counts, headline=_headline(counts), next="raystill judge CONFIG")
    stage.folder.delete(PARTS)
    return manifest


def make_batches(questions: list[Row], *, size: int, system_prompt: str, seed: int) -> list[Row]:
    """Return the work in batches of questions of similar length, which pad little.

    The batches of a run never change: in low precision an answer may depend on what it is batched with.

    Args:
        questions: rows of questions.jsonl.
        seed: of the run; each batch samples with its own.
    """
    ordered = sorted(questions, key=lambda row: (len(row["question"]), row["question_id"]))
    chats = [{"question_id": row["question_id"], "chat": chat_messages(row["question"], system_prompt)} for row in ordered]
    starts = range(0, len(chats), size)
    return [{"number": n, "seed": seed * 10**6 + n, "chats": chats[start : start + size]} for n, start in enumerate(starts)]


class AnswerBatch:
    """Ray Data worker: batches of chats in, answers out; holds one model, loaded when its first batch comes.

    Args:
        make_engine: model name -> loads it, on the worker.
        max_new_tokens: longest answer.
        sampling_temperature: 0 is greedy.
        memory_bytes: most memory the worker may use.
    """

    def __init__(
        self, *, make_engine: dict[str, Callable[[], "Engine"]], max_new_tokens: int, sampling_temperature: float, memory_bytes: int
    ):
        self._make_engine = make_engine
        self._options = {"max_new_tokens": max_new_tokens, "sampling_temperature": sampling_temperature}
        self._memory_bytes = memory_bytes
        self._model = ""
        self._engine: Engine | None = None
        self._peak_is_own = False

    def __call__(self, batch: Row) -> Row:
        """Return {"model", "number", "peak_bytes", "peak_is_own", "answers": Answer rows}.

        `peak_is_own` is false where the peak is that of all models this worker has held.
        """
        chats = [item["chat"] for item in batch["chats"]]
        with memory_limit(self._memory_bytes):
            self._hold(batch["model"])
            began = time.monotonic()
            completions = self._generate(chats, batch["seed"])
        latency_s = (time.monotonic() - began) / len(chats)
        answers = [self._row(item["question_id"], made, latency_s) for item, made in zip(batch["chats"], completions, strict=True)]
        peak = {"peak_bytes": peak_bytes(), "peak_is_own": self._peak_is_own}
        return {"model": batch["model"], "number": batch["number"], **peak, "answers": answers}

    def _hold(self, model: str) -> None:
        """Batches come model by model, so that each is loaded once; the one before is let go first."""
        if model != self._model:
            self._engine = None
            self._peak_is_own = reset_peak()
            self._engine, self._model = self._make_engine[model](), model

    def _generate(self, chats: list[Any], seed: int) -> "list[Completion | Exception]":
        """One bad chat fails its batch, so a failed batch goes on chat by chat."""
        try:
            return list(self._engine.generate(chats, seed=seed, **self._options))
        except (ValueError, RuntimeError, MemoryError) as error:
            return [error] if len(chats) == 1 else [self._generate([chat], seed)[0] for chat in chats]

    def _row(self, question_id: str, made: "Completion | Exception", latency_s: float) -> Row:
        failed = isinstance(made, Exception)
        facts = {"text": "", "finish_reason": "error", "error": f"{type(made).__name__}: {made}"} if failed else made._asdict()
        answer_id = content_id(question_id, self._model, facts["text"])
        row = Answer(answer_id=answer_id, question_id=question_id, model=self._model, latency_s=round(latency_s, 4), **facts)
        return row.model_dump()


def _answer(config: Config, folder: RunFolder, parts: Storage, work: list[Row]) -> list[Row]:
    """Return the results of all batches; each is kept as it comes, and those kept before are not made again."""
    missing = [batch for batch in work if not parts.exists(_part(batch))]
    total = sum(len(batch["chats"]) for batch in work)
    done = total - sum(len(batch["chats"]) for batch in missing)
    pool = {"bundle": config.workers.bundle, "num_workers": config.answer.num_actors}
    with Bar("answer", "answer") as bar:
        bar(done, total)
        for result in each(missing, AnswerBatch, _worker_arguments(config, folder), **pool):
            parts.write_json(_part(result), result)
            done += len(result["answers"])
            bar(done, total, result["model"])
    return [parts.read_json(_part(batch)) for batch in work]


def _part(batch: Row) -> str:
    return f"{batch['model']}-{batch['number']:05d}.json"


def _worker_arguments(config: Config, folder: RunFolder) -> Row:
    from serve.engines import open_engine

    section, workers = config.answer, config.workers
    options = {"dtype": section.dtype, "device": "cuda" if workers.gpus else "cpu", "num_threads": max(1, int(workers.cpus))}
    return {
        "make_engine": {model: functools.partial(open_engine, **folder.model(model)._asdict(), **options) for model in section.models},
        "max_new_tokens": section.max_new_tokens,
        "sampling_temperature": section.sampling_temperature,
        "memory_bytes": workers.memory_bytes,
    }


def _write_table(model: str, made: list[Row], questions: list[Row], results: Storage) -> Row:
    """Write a model's answers in question order and return its counts.

    Raises:
        JobError: every answer is an error; the batches are forgotten, so that the next run tries them again.
    """
    mine = [result for result in made if result["model"] == model]
    rows = {row["question_id"]: row for result in mine for row in result["answers"]}
    reasons = Counter(row["finish_reason"] for row in rows.values())
    if reasons["error"] == len(rows):
        results.delete(PARTS)
        raise JobError(f"{model} answered none of {len(rows)} questions; the first error: {mine[0]['answers'][0]['error']}")
    results.write_parquet(f"{model}.parquet", [rows[question["question_id"]] for question in questions])
    tokens, seconds = sum(row["completion_tokens"] for row in rows.values()), sum(row["latency_s"] for row in rows.values())
    return {
        "answers": len(rows),
        **{reason: reasons[reason] for reason in ("stop", "length", "error")},
        "completion_tokens": tokens,
        "actor_seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "peak_bytes": max(result["peak_bytes"] for result in mine),
        "peak_is_own": all(result["peak_is_own"] for result in mine),
    }


def _headline(counts: dict[str, Row]) -> list[str]:
    each_model = ", ".join(f"{model} {count['tokens_per_s']:.0f}" for model, count in counts.items() if count["tokens_per_s"])
    total = sum(count["answers"] for count in counts.values())
    failed = sum(count["error"] for count in counts.values())
    return [f"answer: {total} answers, {failed} failed; tokens a second of an actor: {each_model}"]
