"""Sequence-level distillation: answers that a teacher writes beforehand, kept one by one as they come, packed as pairs are.

Source: Kim and Rush 2016, arXiv:1606.07947.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ray_jobs.core.cluster import require
from ray_jobs.core.errors import EndpointError, JobError, StorageError
from ray_jobs.core.progress import Bar, OnProgress
from ray_jobs.core.records import content_id
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.packing import IGNORE, pack, packed_row
from ray_jobs.corpus.ray_data import each
from ray_jobs.corpus.selection import hold_out
from ray_jobs.corpus.template import ChatTemplate, chat_messages
from ray_jobs.judging.api_key import read_api_key
from ray_jobs.judging.calls import Call, EndpointOptions, Limits, Reply
from ray_jobs.judging.here import ask_here
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.parse import read_completion
from ray_jobs.training.batches import Batch
from ray_jobs.training.losses import LossSums, cross_entropy_loss
from ray_jobs.training.memory import memory_limit

COUNTS = "counts.json"
KEPT = "kept"
ANSWERS = "answers.jsonl"
BATCH = 8
"""Questions that a model of our own answers at once."""
Row = dict[str, Any]


class Ask(NamedTuple):
    """One question to the teacher, and the key of its answer: the same question to the same teacher is paid for once."""

    key: str
    question: str
    chat: list[dict[str, str]]


def training_questions(prepared: Storage, *, train_on_chunks: bool, eval_share: float) -> list[str]:
    """Return the questions of prepare's pairs that are not held out, in their order."""
    pairs = prepared.read_jsonl("pairs.jsonl")
    chunks = prepared.read_parquet("chunks.parquet") if train_on_chunks else []
    held_out = hold_out([row["chunk_id"] for row in chunks] + [row["pair_id"] for row in pairs], eval_share)
    return [row["question"] for row in pairs if row["pair_id"] not in held_out]


def make_asks(questions: list[str], *, system_prompt: str, writer: dict[str, Any]) -> list[Ask]:
    """Return one ask for each question.

    Args:
        writer: what decides an answer beside the question: model, endpoint, temperature, tokens, seed.
    """
    chats = [chat_messages(question, system_prompt) for question in questions]
    return [Ask(content_id(writer, chat), question, chat) for question, chat in zip(questions, chats, strict=True)]


def ask_endpoint(
    asks: list[Ask],
    kept: Storage,
    ledger: Ledger,
    *,
    request: dict[str, Any],
    endpoint: EndpointOptions,
    max_concurrency: int,
    on_progress: OnProgress,
) -> None:
    """Ask an endpoint for what is not kept yet; each answer is kept as it comes, and so is why one cannot be used.

    Args:
        ledger: keeps what was paid for before anybody reads it.
        request: fields of each request beside the messages.

    Raises:
        EndpointError: it refuses all calls; what has come is kept.
        StorageError: the ledger cannot be written.
    """
    missing = _missing(asks, kept)
    failed: dict[str, str] = {}
    done = 0

    def keep(call: Call, reply: Reply) -> None:
        nonlocal done
        if reply.error:
            failed[call.key] = reply.error
        else:
            kept.write_json(f"{call.key}.json", _from_body(reply.body))
        done += 1
        on_progress(done, len(missing), "")

    calls = [Call(ask.key, {**request, "messages": ask.chat}) for ask in missing]
    asked = ask_here(calls, endpoint=endpoint, ledger=ledger, limits=Limits(max_concurrency=max_concurrency), on_reply=keep)
    if asked.why == "storage":
        raise StorageError(asked.stopped)
    reason = asked.stopped or (next(iter(failed.values())) if failed and len(failed) == len(missing) else "")
    if reason:
        raise EndpointError(f"the writer of distill.text stopped: {reason}; what has come is kept, and the same command goes on")
    for key, error in failed.items():  # not kept as final: the next run asks again
        kept.write_json(f"failed/{key}.json", {"text": "", "error": error})


def _missing(asks: list[Ask], kept: Storage) -> list[Ask]:
    there = set(kept.names())
    return [ask for ask in {ask.key: ask for ask in asks}.values() if f"{ask.key}.json" not in there]


def _from_body(body: str) -> Row:
    completion = read_completion(body)
    cut = bool(completion.text) and bool(completion.problem)
    problem = "the answer was cut at distill.text.max_new_tokens" if cut else completion.problem
    return {"text": completion.text, "error": problem, "completion_tokens": completion.completion_tokens}


class WriteTexts:
    """Ray Data worker: batches of asks in, kept answers out; holds one model.

    Args:
        make_engine: loads it, on the worker.
        kept: where answers are kept.
        options: of the engine's `generate`.
        memory_bytes: most memory the worker may use.
    """

    def __init__(self, *, make_engine: Callable[[], Any], kept: Storage, options: Row, memory_bytes: int):
        self._make_engine, self._kept, self._options, self._memory_bytes = make_engine, kept, options, memory_bytes
        self._engine: Any = None

    def __call__(self, item: Row) -> Row:
        """Answer {"asks"} and keep each answer."""
        asks = [Ask(*ask) for ask in item["asks"]]
        with memory_limit(self._memory_bytes):
            self._engine = self._engine or self._make_engine()
            made = self._engine.generate([ask.chat for ask in asks], **self._options)
        for ask, completion in zip(asks, made, strict=True):
            cut = completion.finish_reason != "stop"
            error = "the answer was cut at distill.text.max_new_tokens" if cut else "" if completion.text.strip() else "empty answer"
            kept = {"text": completion.text, "error": error, "completion_tokens": completion.completion_tokens}
            self._kept.write_json(f"{ask.key}.json", kept)
        return {"num": len(asks)}


def batches_of(asks: list[Ask], kept: Storage, *, size: int) -> list[Row]:
    """Return what is not kept yet in batches for WriteTexts; questions of like length pad little."""
    missing = sorted(_missing(asks, kept), key=lambda ask: len(ask.question))
    return [{"asks": [list(ask) for ask in missing[start : start + size]]} for start in range(0, len(missing), size)]


def write_rows(asks: list[Ask], texts: Storage, template: ChatTemplate, *, max_length: int) -> Row:
    """Write answers.jsonl and the packed training rows of the usable answers, and return the counts.

    Raises:
        JobError: no answer can be trained on.
    """
    rows = [{"question": ask.question, **_found(ask, texts.sub(KEPT))} for ask in asks]
    examples = []
    for row in rows:
        encoded = template.encode_pair(row["question"], row["text"].strip()) if not row["error"] else None
        if encoded is not None and len(encoded.input_ids) > max_length:
            row["error"] = f"{len(encoded.input_ids)} tokens, a row has {max_length}"
        elif encoded is not None:
            examples.append((content_id(row["question"], row["text"]), encoded))
    texts.write_jsonl(ANSWERS, rows)
    if not examples:
        reason = rows[0]["error"] if rows else "prepare kept no pairs: set [data] pairs"
        raise JobError(f"none of {len(rows)} answers can be trained on: {reason}")
    groups = pack([len(encoded.input_ids) for _, encoded in examples], max_length)
    packed = [packed_row([examples[i][0] for i in group], [examples[i][1] for i in group]) for group in groups]
    texts.write_parquet("train/000000.parquet", packed)
    tokens = sum(len(row["input_ids"]) for row in packed)
    labels = sum(label != IGNORE for row in packed for label in row["labels"])
    return {
        "answers": len(rows),
        "failed": len(rows) - len(examples),
        "train_rows": len(packed),
        "train_tokens": tokens,
        "label_tokens": labels,
    }


def _found(ask: Ask, kept: Storage) -> Row:
    for name in (f"{ask.key}.json", f"failed/{ask.key}.json"):
        if kept.exists(name):
            return kept.read_json(name)
    return {"text": "", "error": "never asked"}


def copy_held_out(prepared: Storage, texts: Storage) -> None:
    """Put prepare's held-out rows beside the written ones: what people wrote is what both are measured on."""
    for name in prepared.sub("eval").names():
        texts.write_bytes(f"eval/{name}", prepared.read_bytes(f"eval/{name}"))


def text_loss(model: nn.Module, batch: Batch) -> LossSums:
    """Return the cross-entropy on what the teacher wrote, as the term `ce`."""
    sums = cross_entropy_loss(model, batch)
    return LossSums(sums.total, {"ce": sums.terms["cross_entropy"]})


def write_texts(
    section: Row,
    texts: Storage,
    prepared: Storage,
    questions: list[str],
    *,
    template: ChatTemplate,
    max_length: int,
    make_engine: Callable[[], Any],
    workers: Any,
    seed: int,
) -> Row:
    """Have the answers written that are not kept yet, pack them, and return the counts; a finished folder is left as it is.

    Args:
        section: fields of [distill.text].
        texts: gets kept answers, answers.jsonl, and packed rows in `train` and `eval`.
        prepared: folder of prepare.
        template: of the student.
        make_engine: loads the writer on a worker, where no endpoint is named.
        workers: has the fields of [workers]; needs a connected cluster where no endpoint is named.

    Raises:
        ConfigError: the endpoint's key is not in the environment.
        EndpointError: it refuses all calls.
        JobError: no answer can be trained on.
    """
    if texts.exists(COUNTS):
        return texts.read_json(COUNTS)
    sampling = {"temperature": section["sampling_temperature"], "max_tokens": section["max_new_tokens"], "seed": seed}
    asks = make_asks(
        questions, system_prompt=template.system_prompt, writer={**sampling, **{key: section[key] for key in ("model", "base_url")}}
    )
    kept = texts.sub(KEPT)
    with Bar("distill: texts", "answer") as bar:
        if section["base_url"] is not None:
            way = {"endpoint": _endpoint(section), "max_concurrency": section["max_concurrency"], "on_progress": bar}
            ask_endpoint(asks, kept, Ledger(texts.sub("replies")), request={"model": section["model"], **sampling}, **way)
        else:
            options = {**{key: section[key] for key in ("max_new_tokens", "sampling_temperature")}, "seed": seed}
            arguments = {"make_engine": make_engine, "kept": kept, "options": options, "memory_bytes": workers.memory_bytes}
            items = batches_of(asks, kept, size=BATCH)
            require("[workers] of distill.text", workers.bundle)
            results = each(items, WriteTexts, arguments, bundle=workers.bundle, num_workers=workers.max_workers)
            for done, _ in enumerate(results, start=1):
                bar(done * BATCH, len(items) * BATCH)
    counts = write_rows(asks, texts, template, max_length=max_length)
    copy_held_out(prepared, texts)
    texts.write_json(COUNTS, counts)
    return counts


def _endpoint(section: Row) -> EndpointOptions:
    otherwise = " (to any word for an endpoint that asks for none), or remove base_url"
    key = read_api_key("the endpoint of distill.text", variable=section["api_key_env"], otherwise=otherwise)
    return EndpointOptions(key, section["base_url"], repeats_cut=False)
