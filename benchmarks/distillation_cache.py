"""What each kind of kept target takes on disk, what it costs beside the teacher's forward pass, and how far it leads the student astray.

python -m benchmarks.distillation_cache --wikitext FOLDER [--steps 0 6] [--texts wikitext course] [--out distillation_cache.jsonl]

FOLDER holds WikiText-2's valid.txt (the student is trained on it and the course) and test.txt (held out). The teacher is
SmolLM2-135M-Instruct, the student 20 of its layers after so many steps. Kept targets go through the job's own cache and are read
back from its files; what they say is held against the dense divergence in float32. benchmarks/DISTILLATION.md has the results.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.distillation_quality import known, make_student, train_student
from benchmarks.quality_rows import TextRows, write_text_rows
from benchmarks.turns import add_result, ratio, versions

MODEL = "smollm2-135m-instruct"
KINDS = ("hidden-float32", "hidden-bfloat16", "hidden-float16", "top-16", "top-64", "top-256")
TEXTS = ("wikitext", "course")
TEMPERATURES = (1.0, 2.0)
TRAINING = {"kd_weight": 1.0, "ce_weight": 0.0, "hidden_weight": 0.0}
SETTINGS = ("model", "layers", "length", "eval_rows", "turns", "learning_rate", "global_batch_size", "dtype", "seed", "threads")


def main() -> None:
    options = arguments()
    settings = {name: getattr(options, name) for name in SETTINGS}
    wanted = itertools.product(options.divergences, options.steps, options.texts)
    done = {(run["divergence"], run["steps"], run["text"]) for run in known(options.out) if run["settings"] == settings}
    for divergence, steps, text in (each for each in wanted if each not in done):
        case = {"divergence": divergence, "steps": steps, "text": text}
        facts = {"settings": settings, "versions": versions(), "load": os.getloadavg()[0]}
        began = time.perf_counter()
        add_result(options.out, {**case, **facts, **measure(options, **case)})
        print(f"{divergence}, {text}, student after {steps} steps: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    runs = [run for run in known(options.out) if run["settings"] == settings]
    print("\n\n".join([cost_table(runs), *map(error_table, runs)]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True, help="folder with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--model", default=MODEL, help="the teacher")
    parser.add_argument("--layers", type=int, default=20, help="layers of the student")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 6], help="a student after so many steps; each is measured")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--divergences", nargs="+", default=["forward_kl", "jsd"], choices=["forward_kl", "reverse_kl", "jsd"])
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--eval-rows", type=int, default=4, help="held-out rows of each text, at most")
    parser.add_argument("--turns", type=int, default=5, help="of teacher and cache; one before them does not count")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--global-batch-size", type=int, default=2, help="rows of a step")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--dtype", default="auto", help="of the training's products; all that is measured is in float32")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "distillation_cache", help="students (0.4 GB each)")
    parser.add_argument("--out", type=Path, default=Path("distillation_cache.jsonl"), help="results, one JSON line a case; added to")
    return parser.parse_args()


def measure(options: argparse.Namespace, *, divergence: str, steps: int, text: str) -> dict[str, Any]:
    """Return costs of each kind on one text, and errors of a divergence with the student after so many steps."""
    import torch

    from benchmarks.kept_targets import turn
    from ray_jobs.core.models import resolve_model
    from ray_jobs.distillation.targets import WorkerTeacher
    from ray_jobs.training.batches import PackedRows, eval_batches
    from ray_jobs.training.models import load_model

    torch.set_num_threads(options.threads)
    model = resolve_model(options.model)
    teacher = load_model(model, dtype=torch.float32).requires_grad_(False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"length": options.length, "num_train": max(steps, 1) * options.global_batch_size, "num_eval": options.eval_rows}
        rows = write_text_rows(folder / "rows", model, wikitext=options.wikitext, **sizes)
        student = student_after(steps, teacher, rows, options)
        batches = list(eval_batches(PackedRows(getattr(rows, text)), micro_batch_size=1))
        exact = [WorkerTeacher(teacher).of(batch) for batch in batches]
        seconds: list[dict[str, Any]] = []
        for number in range(options.turns + 1):
            took = {"teacher": forward_seconds(teacher, batches)}
            found = {kind: turn(kind, teacher, batches, exact, folder / f"{kind}-{number}") for kind in KINDS}
            seconds.append({**took, **{kind: each.seconds for kind, each in found.items()}})
        num_tokens = sum(batch.num_valid for batch in batches)
        kept = {kind: each.targets for kind, each in found.items()}
        return {
            "num_tokens": num_tokens,
            "bytes_per_token": {kind: each.num_bytes / num_tokens for kind, each in found.items()},
            "seconds": seconds[1:],
            "errors": all_errors(student, batches, exact, kept, name=divergence),
        }


def student_after(steps: int, teacher: Any, rows: TextRows, options: argparse.Namespace) -> Any:
    """Return the student, trained once for each number of steps and kept in the work folder."""
    import torch

    from ray_jobs.training.models import load_model

    names = (options.layers, steps, options.length, options.global_batch_size, options.learning_rate, options.dtype, options.seed)
    folder = options.work / "-".join(str(name) for name in (Path(str(options.model)).name, *names))
    if not (folder / "model.safetensors").exists():
        student, _ = make_student(teacher, {}, rows, options)
        if steps:
            options = argparse.Namespace(**{**vars(options), "steps": steps})
            train_student(student, teacher, TRAINING, rows, options)
        student.save_pretrained(folder)
    return load_model(folder, dtype=torch.float32).requires_grad_(False)


def forward_seconds(teacher: Any, batches: list[Any]) -> dict[str, float]:
    """Return CPU and wall time of the teacher's targets: what a cache saves."""
    from ray_jobs.distillation.targets import WorkerTeacher

    cpu, wall, asked = time.process_time(), time.perf_counter(), WorkerTeacher(teacher)
    for batch in batches:
        asked.of(batch)
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def all_errors(student: Any, batches: list[Any], exact: list[Any], kept: dict[str, list[Any]], *, name: Any) -> list[dict[str, Any]]:
    """Return `errors` of a divergence for each temperature and kind."""
    import torch

    from benchmarks.kept_targets import errors, exact_word, kept_word
    from ray_jobs.distillation.divergence import Divergence
    from ray_jobs.training.losses import valid_hidden

    with torch.no_grad():
        hidden = [valid_hidden(student, batch)[0] for batch in batches]
    head_VH, found = student.get_output_embeddings().weight, []
    for temperature in TEMPERATURES:
        divergence = Divergence(name, temperature=temperature)
        true = [exact_word(hidden_NH, head_VH, target, divergence) for hidden_NH, target in zip(hidden, exact, strict=True)]
        for kind, targets in kept.items():
            words = [kept_word(hidden_NH, head_VH, target, divergence) for hidden_NH, target in zip(hidden, targets, strict=True)]
            found.append({"temperature": temperature, "kind": kind, **errors(words, true)})
    return found


def cost_table(runs: list[dict[str, Any]]) -> str:
    """Return Markdown: bytes a token on disk, and time to write and read beside the teacher's forward pass of the same turn."""
    lines = ["| kept | bytes a token | write / forward | read / forward | read, tokens a CPU second |", "|---|---|---|---|---|"]
    turns = [each for run in runs for each in run["seconds"]]
    num_tokens = [run["num_tokens"] for run in runs for _ in run["seconds"]]
    for kind in KINDS:
        sizes = [run["bytes_per_token"][kind] for run in runs]
        shares = [ratio([each[kind][f"{what}_cpu_s"] / each["teacher"]["cpu_s"] for each in turns], digits=3) for what in ("write", "read")]
        rate = statistics.median(tokens / each[kind]["read_cpu_s"] for tokens, each in zip(num_tokens, turns, strict=True))
        lines.append(f"| {kind} | {max(sizes):.0f} | {' | '.join(shares)} | {rate:.0f} |")
    forward = ratio([1000 * each["teacher"]["cpu_s"] / tokens for tokens, each in zip(num_tokens, turns, strict=True)])
    lines.append(f"\nThe teacher's forward pass takes {forward} CPU ms a token; {len(turns)} turns.")
    return "\n".join(lines)


def error_table(run: dict[str, Any]) -> str:
    """Return Markdown: what a kept target says against the exact one, for one student and text."""
    lines = [
        f"{run['divergence']}, {run['text']}, {run['num_tokens']} tokens, student after {run['steps']} steps:\n",
        "| T | kept | exact, nats | mean abs. error, nats | error / exact | bias, nats | gradient norm / exact "
        "| 1 - cosine | gradient error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in run["errors"]:
        values = [f"{row[name]:.2g}" for name in ("error_nats", "relative", "bias_nats")]
        values += [f"{row['norm_ratio']:.4f}", f"{row['cosine_gap']:.2g}", f"{row['gradient_error']:.2g}"]
        head = f"| {row['temperature']:g} | {row['kind']} | {row['exact_nats']:.4f}"
        lines.append(f"{head} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
