"""The student -> its quantized and exported variants, and one table of size, speed and held-out quality (Ray tasks)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_jobs.core.cluster import connect, progress_board, require
from ray_jobs.core.config import Config, WorkersSection
from ray_jobs.core.errors import DataError
from ray_jobs.core.progress import OnProgress, say
from ray_jobs.core.run_folder import ModelSource, RunFolder
from ray_jobs.core.storage import Storage
from ray_jobs.core.tasks import start_task, task_results

if TYPE_CHECKING:
    from pathlib import Path

    from ray_jobs.compression.bench import Candidate
    from ray_jobs.compression.quality import Segment
    from ray_jobs.compression.variants import Source

REFERENCE = "student"
EXPORTED = "export.json"
PROMPT_TOKENS = 64
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000"}
"""torch's OpenMP threads wait for each other by spinning, 300,000 rounds by default; where anything else runs on the
machine that made two threads several times slower than one. 1000 is OpenMP's own figure for shared CPUs."""
ENGINE_TITLES = {"openvino": "OpenVINO", "onnxruntime-genai": "ONNX Runtime", "torch": "torch"}


class Work(NamedTuple):
    """What the tasks on the cluster need; picklable."""

    config: Config
    teacher: ModelSource
    prepare: Storage
    distill: Storage
    target: Storage


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Export the variants, measure them beside base, teacher and student, and return the stage's manifest.

    Raises:
        StageMissing: there is no student or no held-out text yet.
        DataError: no text was held out.
        ModelError: an export does not say what the student says.
        JobError: a task was lost, or passed its memory limit.
    """
    folder = RunFolder(config)
    _require_held_out(folder.finished("prepare")["counts"])
    stage = folder.stage("compress", sections=["compress", "teacher"], after=["prepare", "finetune", "distill"], force=force)
    if stage.manifest:
        say("compress: done already")
        return stage.manifest
    work = Work(config, folder.model("teacher"), folder.folder("prepare"), folder.folder("distill"), stage.folder)
    with connect():
        bundle = config.workers.bundle
        require("[workers] of compress", bundle)
        exports = _export_missing(work)
        with progress_board("compress: measure", "model") as on_progress:
            task = start_task(_measure, work, on_progress, bundle=bundle, environment=SHORT_SPIN)
            (rows,) = task_results([task], what="compress")
    stage.folder.write_json("table.json", rows)
    return stage.finish(
        counts={"variants": len(exports), "rows": len(rows)},
        exports=exports,
        headline=_headline(rows, config.compress.variants),
        next="raystill report CONFIG",
    )


def _require_held_out(counts: dict[str, Any]) -> None:
    if not counts["eval_rows"]:
        raise DataError(
            f"compress measures quality on held-out text, and prepare held out {counts['eval_rows']} rows: raise data.eval_share"
        )


def _export_missing(work: Work) -> dict[str, Any]:
    """Export what is not there yet, engines side by side, and return the facts of all exports."""
    from ray_jobs.compression.variants import by_engine

    names = list(dict.fromkeys(work.config.compress.variants))
    missing = by_engine([name for name in names if not work.target.exists(f"{name}/{EXPORTED}")])
    bundle = {"CPU": min(1.0, work.config.workers.cpus), "memory": work.config.workers.memory_bytes}
    if missing:
        say(f"compress: exporting {', '.join(name for group in missing.values() for name in group)}")
        tasks = [start_task(_export, work, *group, bundle=bundle, environment=SHORT_SPIN) for group in missing.items()]
        task_results(tasks, what="compress")
    return {name: work.target.read_json(f"{name}/{EXPORTED}") for name in names}


def _export(work: Work, engine: str, names: list[str]) -> None:
    """Task: write one engine's variants into the stage folder, each whole before its `export.json`."""
    import torch

    from ray_jobs.compression.variants import export
    from ray_jobs.training.memory import memory_limit

    torch.set_num_threads(1)
    with memory_limit(work.config.workers.memory_bytes):
        for made in export(engine, names, _source(work)):
            work.target.upload(made.folder, made.name)
            work.target.write_json(f"{made.name}/{EXPORTED}", made.facts)


def _measure(work: Work, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Task: measure all rows of the table, alone on its CPUs."""
    import torch

    from ray_jobs.compression.bench import measure
    from ray_jobs.training.memory import memory_limit

    torch.set_num_threads(max(1, int(work.config.workers.cpus)))
    section = work.config.compress
    segments = _held_out(work)
    with memory_limit(work.config.workers.memory_bytes):
        return measure(
            _candidates(work),
            prompts=_prompts(work, segments),
            segments=segments,
            new_tokens=section.new_tokens,
            repetitions=section.repetitions,
            reference=REFERENCE,
            on_progress=on_progress,
        )


def _source(work: Work) -> "Source":
    import torch

    from ray_jobs.compression.variants import Source
    from ray_jobs.training.models import load_model

    folder = work.distill.local("student")
    prompt = _prompts(work, _held_out(work))[0]
    return Source(folder, lambda: load_model(folder, dtype=torch.float32), prompt)


def _held_out(work: Work) -> "list[Segment]":
    from ray_jobs.compression.quality import split_rows

    rows: list[dict[str, Any]] = []
    wanted = work.config.compress.num_rows
    storage = work.prepare.sub("eval")
    for name in storage.names():
        rows += storage.read_parquet(name) if name.endswith(".parquet") and len(rows) < wanted else []
    return split_rows(rows[:wanted])


def _prompts(work: Work, segments: "list[Segment]") -> list[list[int]]:
    """Return the token ids of evenly spaced questions; where the run has none, the starts of held-out texts."""
    from ray_jobs.corpus.template import chat_messages
    from ray_jobs.training.models import load_tokenizer

    wanted = work.config.compress.num_questions
    questions = [row["question"] for row in work.prepare.read_jsonl("questions.jsonl")]
    if not questions:
        return [segment.input_ids[:PROMPT_TOKENS] for segment in segments[:wanted]]
    tokenizer = load_tokenizer(work.distill.local("student"))
    chosen = questions[:: max(1, len(questions) // wanted)][:wanted]
    chats = [chat_messages(question, work.config.data.system_prompt) for question in chosen]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def _candidates(work: Work) -> "list[Candidate]":
    """Return base, teacher, student on each device that a worker gets, then the student's variants."""
    plain = [candidate for device in devices(work.config.workers) for candidate in _plain_models(work, device)]
    return plain + [_variant(name, work.target.local(name)) for name in dict.fromkeys(work.config.compress.variants)]


def devices(workers: WorkersSection) -> list[str]:
    """Return where the plain models are measured: on a GPU only where the task is given one, whatever its node has."""
    return ["cpu", "cuda"] if workers.device == "cuda" else ["cpu"]


def _plain_models(work: Work, device: str) -> "list[Candidate]":
    import torch

    from ray_jobs.compression.runtimes import TorchRuntime
    from ray_jobs.core.models import resolve_model
    from ray_jobs.core.storage import local_folder
    from ray_jobs.training.adapters import load_named
    from ray_jobs.training.models import choose_dtype, load_model

    dtype = torch.float32 if device == "cpu" else choose_dtype("auto", device)
    base, student = resolve_model(work.config.teacher.model), work.distill.local("student")
    teacher = [resolve_model(work.teacher.model), *([local_folder(work.teacher.adapter)] if work.teacher.adapter else [])]
    return [
        _plain("base", device, dtype, [base], lambda: TorchRuntime(load_model(base, dtype=dtype, device=device))),
        _plain("teacher", device, dtype, teacher, lambda: TorchRuntime(load_named(*work.teacher, dtype=dtype, device=device))),
        _plain("student", device, dtype, [student], lambda: TorchRuntime(load_model(student, dtype=dtype, device=device))),
    ]


def _plain(name: str, device: str, dtype: Any, folders: "list[Path]", open_runtime: Callable[[], Any]) -> "Candidate":
    from ray_jobs.compression.bench import Candidate, folder_bytes
    from ray_jobs.compression.variants import with_version

    precision = str(dtype).removeprefix("torch.")
    facts = {"engine": with_version("transformers"), "precision": precision, "device": device, "size_bytes": folder_bytes(*folders)}
    return Candidate(name if device == "cpu" else f"{name}-{device}", facts, open_runtime, is_variant=name == REFERENCE)


def _variant(name: str, folder: "Path") -> "Candidate":
    import torch

    from ray_jobs.compression.bench import Candidate, folder_bytes
    from ray_jobs.compression.variants import ENGINES, VARIANTS, open_variant, with_version

    variant = VARIANTS[name]
    engine = with_version(ENGINES[variant.engine].package)
    facts = {"engine": engine, "precision": variant.precision, "device": "cpu", "size_bytes": folder_bytes(folder)}
    return Candidate(name, facts, lambda: open_variant(name, folder, num_threads=torch.get_num_threads()))


def _headline(rows: list[dict[str, Any]], variants: list[str]) -> list[str]:
    lines = []
    for row in rows:
        if row["name"] in variants:
            engine = ENGINE_TITLES[row["engine"].split()[0]]
            lines.append(
                f"compress: student {row['precision']} ({engine}): {row['size_bytes'] / 1e9:.2f} GB, "
                f"{row['speedup']:.1f}x the tokens/s of the float32 student, {round(row['loss_change_nats'], 3) + 0.0:+.3f} nats"
            )
    return lines
