"""documents -> clean chunks -> question/answer pairs -> packed token ids (Ray Data)."""

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config
from ray_jobs.core.errors import ConfigError, DataError, ModelError
from ray_jobs.core.models import check_context, resolve_model
from ray_jobs.core.progress import Bar, say
from ray_jobs.core.records import Question
from ray_jobs.core.run_folder import RunFolder, Stage
from ray_jobs.corpus import documents, pairs
from ray_jobs.corpus.examples import Dropped
from ray_jobs.corpus.files import InputFile, find_file, find_files
from ray_jobs.corpus.leaks import reference_runs
from ray_jobs.corpus.parts import dropped_of, is_finished, part_names
from ray_jobs.corpus.plain_texts import PlainTexts
from ray_jobs.corpus.ray_data import each
from ray_jobs.corpus.selection import Pick, Selector, Shard, by_part, plan_shards, select
from ray_jobs.corpus.tables import Packed, write_chunks, write_lines
from ray_jobs.corpus.template import ChatTemplate, require_chat_template
from ray_jobs.corpus.workers import PackShard, ReadFile, WritePairs
from ray_jobs.corpus.writer import CHUNKS_PER_BATCH, Engine
from ray_jobs.distillation.encoders.kinds import check_teacher
from ray_jobs.distillation.shares import check_sources, teaching_of

PARTS = "parts"
_READER_BUNDLE = {"CPU": 1.0}
_READER_BYTES = 2**20  # of input for each worker: starting one takes as long as reading about so much


class Inputs(NamedTuple):
    """What the config names, found and checked."""

    files: list[InputFile]
    texts: list[InputFile]
    questions_file: InputFile | None
    questions: list[Question]
    ignored: list[str]


def check(config: Config) -> Inputs:
    """Return the inputs; reads no document and no pair.

    Raises:
        ConfigError: a row is longer than the teacher's positions, the teacher cannot do `distill.task`, or one of [distill.teachers]
            is to teach a file that is not there.
        DataError: a file is missing, all are empty, or the questions cannot be used.
        ModelError: the teacher, or the writer of pairs, has no tokenizer or no chat template.
    """
    data, for_encoder = config.data, config.distill.task != "language_model"
    check_teacher(config.teacher.model, config.distill.task)
    found, ignored = find_files(data.documents, suffixes=documents.READERS, what="[data] documents")
    ready, also_ignored = find_files(data.pairs, suffixes=pairs.READERS, what="[data] pairs")
    texts, not_texts = find_files(data.texts, suffixes=pairs.READERS, what="[data] texts")
    if texts and not for_encoder:
        raise ConfigError(f'[data] texts = {data.texts} are for encoders, and distill.task = "language_model": use documents or pairs')
    if not any(file.size() for file in found + ready + texts):
        raise DataError(
            f"corpus is empty: {len(found)} documents and {len(ready) + len(texts)} files of pairs or texts with 0 bytes; "
            "set [data] documents or pairs"
        )
    if not (ready or texts or data.train_on_chunks or data.pairs_per_chunk):
        raise DataError("nothing to train on: [data] pairs = [], train_on_chunks = false and pairs_per_chunk = 0; set one of them")
    questions_file = find_file(data.questions, suffixes=pairs.READERS, what="[data] questions") if data.questions else None
    questions = pairs.read_questions(questions_file) if questions_file else []
    for model in {*([] if for_encoder else [config.teacher.model]), *([data.pair_writer] if data.pairs_per_chunk else [])}:
        require_chat_template(resolve_model(model), model)
    check_context(resolve_model(config.teacher.model), config.teacher.model, data.max_length)
    check_sources(teaching_of(config.distill.model_dump()), [file.name for file in found + ready + texts])
    return Inputs(found + ready, texts, questions_file, questions, ignored + also_ignored + not_texts)


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Prepare the course's data and return the stage's manifest.

    Raises:
        DataError: as `check`, or nothing is left of the input.
        ModelError: as `check`, or the chat template cannot be trained on.
    """
    folder = RunFolder(config)
    inputs = check(config)
    hashes = {file.name: file.sha256() for file in [*inputs.files, *inputs.texts, *filter(None, [inputs.questions_file])]}
    sections = ["teacher", "data", *(["distill.task"] if config.distill.task != "language_model" else [])]
    stage = folder.stage("prepare", sections=sections, after=[], force=force, facts={"files": hashes})
    if stage.manifest:
        say("prepare: done already")
        return stage.manifest
    with connect():
        require("prepare", _READER_BUNDLE)
        try:
            counts, sources, dropped = _Prepare(config, stage, inputs).work()
        except (DataError, ModelError):
            folder.discard(stage)
            raise
    stage.folder.write_jsonl("dropped.jsonl", [item._asdict() for item in dropped])
    manifest = stage.finish(counts=counts, sources=sources, headline=_headline(counts), next=f"raystill {_next_stage(config)} CONFIG")
    stage.folder.delete(PARTS)
    return manifest


class _Prepare:
    """One run of the stage: read, choose, write."""

    def __init__(self, config: Config, stage: Stage, inputs: Inputs):
        self._config = config
        self._folder = stage.folder
        self._parts = stage.folder.sub(PARTS)
        self._inputs = inputs
        data = config.data
        make_template = functools.partial(_load_template, config.teacher.model, data.system_prompt)
        if config.distill.task != "language_model":
            make_template = functools.partial(_load_texts, config.teacher.model, config.distill.task, data.max_length)
        asked = reference_runs(inputs.questions)
        self._common = {"parts": self._parts, "make_template": make_template, "max_length": data.max_length, "asked": asked}

    def work(self) -> tuple[dict[str, Any], dict[str, Any], list[Dropped]]:
        """Do all, and return the counts, those of each source by name, and what was dropped."""
        units = self._read_files()
        picks, _ = self._select(units)
        units += self._write_pairs([pick for pick in picks if pick.kind == "chunk"])
        picks, repeats = self._select(units)
        dropped = [Dropped("unsupported file", name) for name in self._inputs.ignored]
        dropped += [*dropped_of(self._parts, units), *repeats]
        trained = [pick for pick in picks if pick.kind != "chunk" or self._config.data.train_on_chunks]
        self._require_some(trained, dropped)
        packed = self._pack(trained)
        self._write_tables(picks)
        return self._counts(picks, packed, dropped), packed.listed, dropped

    def _read_files(self) -> list[str]:
        files, texts = self._inputs.files, self._inputs.texts
        items = [{"unit": f"file-{i:06d}", "file": file, "texts": i >= len(files)} for i, file in enumerate(files + texts)]
        arguments = {**self._common, "chunk_tokens": self._config.data.chunk_tokens}
        num_workers = min(_num_cpus(), 1 + sum(file.size() for file in files + texts) // _READER_BYTES)
        self._each(items, ReadFile, arguments, label="read", unit="file", bundle=_READER_BUNDLE, num_workers=num_workers)
        return [item["unit"] for item in items]

    def _write_pairs(self, chunks: list[Pick]) -> list[str]:
        data, workers = self._config.data, self._config.workers
        if not data.pairs_per_chunk:
            return []
        require("[workers] of the pair writer", workers.bundle)
        make_engine = functools.partial(_load_engine, data.pair_writer, workers.device, max(1, int(workers.cpus)))
        arguments = {**self._common, "make_engine": make_engine, "pairs_per_chunk": data.pairs_per_chunk, "seed": self._config.run.seed}
        batches = [
            {"part": part, "rows": rows[start : start + CHUNKS_PER_BATCH]}
            for part, rows in by_part(chunks)
            for start in range(0, len(rows), CHUNKS_PER_BATCH)
        ]
        items = [{"unit": f"written-{i:06d}", **batch} for i, batch in enumerate(batches)]
        bundle, num_workers = workers.bundle, workers.max_workers
        self._each(items, WritePairs, arguments, label="write pairs", unit="batch", bundle=bundle, num_workers=num_workers)
        return [item["unit"] for item in items]

    def _each(self, items: list[dict[str, Any]], kind: type, arguments: dict[str, Any], *, label: str, unit: str, **pool: Any) -> None:
        """Do the units that are not finished."""
        open_items = [item for item in items if not is_finished(self._parts, item["unit"])]
        with Bar(f"prepare: {label}", unit) as bar:
            for done, _ in enumerate(each(open_items, kind, arguments, **pool), start=len(items) - len(open_items) + 1):
                bar(done, len(items))

    def _select(self, units: list[str]) -> tuple[list[Pick], list[Dropped]]:
        selector = Selector(near_duplicate=self._config.data.near_duplicate, questions=self._inputs.questions)
        return select(self._parts, part_names(self._parts, units), selector)

    def _require_some(self, trained: list[Pick], dropped: list[Dropped]) -> None:
        if trained:
            return
        reasons = ", ".join(f"{num} {reason}" for reason, num in _by_reason(dropped).items()) or "all chunks are left out"
        first = f"; first: {dropped[0].what}" if dropped else ""
        raise DataError(
            f"nothing is left to train on of {len(self._inputs.files + self._inputs.texts)} files ({reasons}{first}): check [data]"
        )

    def _pack(self, picks: list[Pick]) -> Packed:
        data = self._config.data
        shards = plan_shards(picks, eval_share=data.eval_share)
        require_train(shards, data.eval_share)
        items = [{"shard": shard} for shard in shards]
        arguments = {"parts": self._parts, "target": self._folder, "max_length": data.max_length}
        packed = Packed()
        with Bar("prepare: pack", "shard") as bar:
            results = each(items, PackShard, arguments, bundle=_READER_BUNDLE, num_workers=_num_cpus())
            for done, result in enumerate(results, start=1):
                packed.add(result.pop("split"), result)
                bar(done, len(items))
        return packed

    def _write_tables(self, picks: list[Pick]) -> None:
        write_chunks(self._parts, self._folder, by_part(pick for pick in picks if pick.kind == "chunk"))
        for kind in ("pair", "text"):
            write_lines(self._parts, self._folder, f"{kind}s.jsonl", by_part(pick for pick in picks if pick.kind == kind))
        self._folder.write_jsonl("questions.jsonl", [question.model_dump() for question in self._inputs.questions])

    def _counts(self, picks: list[Pick], packed: Packed, dropped: list[Dropped]) -> dict[str, Any]:
        kinds, train, held_out = Counter(pick.kind for pick in picks), packed.splits["train"], packed.splits["eval"]
        return {
            "documents": sum(file.suffix in documents.READERS for file in self._inputs.files) - _by_reason(dropped)["unreadable document"],
            "chunks": kinds["chunk"],
            "pairs": kinds["pair"],
            "texts": kinds["text"],
            "questions": len(self._inputs.questions),
            "train_rows": train["rows"],
            "eval_rows": held_out["rows"],
            "train_tokens": train["tokens"],
            "label_tokens": train["label_tokens"],
            "eval_label_tokens": held_out["label_tokens"],
            "dropped": dict(_by_reason(dropped)),
        }


def require_train(shards: list[Shard], eval_share: float) -> None:
    """Refuse a plan that holds out every example.

    Raises:
        DataError: no shard of the training split has an example.
    """
    if not any(shard.picks for shard in shards if shard.split == "train"):
        num = sum(len(rows) for shard in shards for _, rows in shard.picks)
        raise DataError(f"all {num} examples are held out, none is left to train on: lower [data] eval_share (now {eval_share:g})")


def _headline(counts: dict[str, Any]) -> list[str]:
    dropped = ", ".join(f"{num} {reason}" for reason, num in counts["dropped"].items()) or "nothing"
    return [
        f"prepare: {counts['documents']} documents gave {counts['chunks']} chunks; with {counts['pairs']} pairs{_and_texts(counts)}: "
        f"{counts['train_rows']} rows, {counts['eval_rows']} held out; "
        f"{counts['train_tokens']:,} tokens, {counts['label_tokens']:,} of them trained; "
        f"{counts['questions']} questions; dropped: {dropped}"
    ]


def _and_texts(counts: dict[str, Any]) -> str:
    return f" and {counts['texts']} texts" if counts["texts"] else ""


def _next_stage(config: Config) -> str:
    return "finetune" if config.distill.task == "language_model" else "distill"


def _by_reason(dropped: Iterable[Dropped]) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for item in dropped:
        reasons[item.reason] += item.num
    return reasons


def _num_cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _load_template(model: str, system_prompt: str) -> ChatTemplate:
    return ChatTemplate(resolve_model(model), system_prompt=system_prompt)


def _load_texts(model: str, task: str, max_length: int) -> PlainTexts:
    return PlainTexts(resolve_model(model), task=task, max_length=max_length)


def _load_engine(model: str, device: str, num_threads: int) -> Engine:
    from serve.engines import TransformersEngine

    return TransformersEngine(str(resolve_model(model)), device=device, num_threads=num_threads)
