"""What each part of the recipe is worth, after DistilBERT's table: students of SmolLM2-135M's layers, on the course and WikiText-2.

python -m benchmarks.distillation_quality --wikitext FOLDER [--steps 40] [--rows triple ce-only] [--out distillation_quality.jsonl]

FOLDER holds WikiText-2's valid.txt (trained on) and test.txt (held out). A row that --out has already with the same settings is
not trained again. benchmarks/DISTILLATION.md has the results.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.quality_rows import TextRows, write_text_rows
from benchmarks.turns import add_result, results, versions

MODEL = "smollm2-135m-instruct"
TRIPLE = {"kd_weight": 5.0, "ce_weight": 2.0, "hidden_weight": 1.0}
ROWS: dict[str, dict[str, Any]] = {
    "cut": {"what": "evenly spaced layers, not trained", "trained": False},
    "triple": {"what": "divergence + labels + hidden states", **TRIPLE},
    "ce-only": {"what": "without KD: labels alone", "kd_weight": 0.0, "ce_weight": 1.0, "hidden_weight": 0.0},
    "without-hidden": {"what": "without hidden states", **TRIPLE, "hidden_weight": 0.0},
    "random": {"what": "random start", **TRIPLE, "start": "random"},
    "influence-cut": {"what": "layers by influence, not trained", "choose": "influence", "trained": False},
    "influence": {"what": "layers by influence", **TRIPLE, "choose": "influence"},
}
"""Each differs from `triple` in what its name says; all are trained on the same tokens in the same order."""
SETTINGS = ("layers", "steps", "length", "global_batch_size", "learning_rate", "dtype", "eval_rows", "seed")


def main() -> None:
    options = arguments()
    settings = {name: getattr(options, name) for name in SETTINGS}
    done = {run["row"] for run in known(options.out) if run["settings"] == settings}
    with tempfile.TemporaryDirectory() as folder:
        for row in (row for row in options.rows if row not in done):
            run = {"row": row, "settings": settings, "versions": versions(), **measure(row, options, Path(folder))}
            print(f"{row}: held-out perplexity {run['wikitext']['perplexity']:.1f}, {run['seconds']:.0f} s", file=sys.stderr)
            add_result(options.out, run)
    print(table([run for run in known(options.out) if run["settings"] == settings]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True, help="folder with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--model", default=MODEL, help="the teacher")
    parser.add_argument("--layers", type=int, default=20, help="layers of the students")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--global-batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--eval-rows", type=int, default=8, help="held-out rows of each text, at most")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("distillation_quality.jsonl"), help="results, one JSON line a row; added to")
    return parser.parse_args()


def known(file: Path) -> list[dict[str, Any]]:
    return results(file) if file.exists() else []


def measure(row: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one student and return what it reaches on held-out text, its size and its speed."""
    import torch

    from ray_jobs.core.models import resolve_model
    from ray_jobs.training.models import choose_dtype, load_model

    torch.set_num_threads(options.threads)
    began, spec, model = time.perf_counter(), ROWS[row], resolve_model(options.model)
    dtype = choose_dtype(options.dtype, options.device)
    sizes = {"length": options.length, "num_train": options.steps * options.global_batch_size, "num_eval": options.eval_rows}
    rows = write_text_rows(folder, model, wikitext=options.wikitext, **sizes)
    teacher = load_model(model, dtype=dtype, device=options.device)
    student, layers = make_student(teacher, spec, rows, options)
    if spec.get("trained", True):
        train_student(student, teacher, spec, rows, options)
    found = {name: held_out(student, teacher, getattr(rows, name), dtype) for name in ("wikitext", "course")}
    parameters = {name: sum(p.numel() for p in each.parameters()) for name, each in (("student", student), ("teacher", teacher))}
    speed = forward_speeds(student.to(dtype), teacher, length=options.length)
    return {**found, "layers": layers, "num_parameters": parameters, "speed": speed, "seconds": time.perf_counter() - began}


def make_student(teacher: Any, spec: dict[str, Any], rows: TextRows, options: argparse.Namespace) -> tuple[Any, list[int]]:
    """Return the student before training, in float32, and which of the teacher's layers it has."""
    import torch
    from transformers import AutoModelForCausalLM

    from ray_jobs.distillation.layers import choose_layers
    from ray_jobs.distillation.student import build_student, shrink_config
    from ray_jobs.training.batches import PackedRows

    layers = choose_layers(teacher.config.num_hidden_layers, options.layers)
    if spec.get("choose") == "influence":
        from ray_jobs.distillation.influence import measure_influence, most_influential

        found = measure_influence(teacher, PackedRows(rows.train), seed=options.seed, num_rows=8)
        layers = most_influential(found["influence"], options.layers)
    if spec.get("start") != "random":
        return build_student(teacher, layers).to(options.device), layers
    torch.manual_seed(options.seed)
    config = shrink_config(teacher.config, layers)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").to(options.device), layers


def train_student(student: Any, teacher: Any, spec: dict[str, Any], rows: TextRows, options: argparse.Namespace) -> None:

    from ray_jobs.distillation.divergence import Divergence
    from ray_jobs.distillation.loss import DistillLoss
    from ray_jobs.distillation.targets import WorkerTeacher
    from ray_jobs.training.batches import PackedRows
    from ray_jobs.training.loop import train
    from ray_jobs.training.losses import cross_entropy_loss
    from ray_jobs.training.recipe import Recipe

    weights: dict[str, Any] = {name: spec[name] for name in ("kd_weight", "ce_weight")}
    if spec["hidden_weight"]:
        from ray_jobs.distillation.hidden_states import HiddenLoss

        weights["hidden"] = HiddenLoss(spec["hidden_weight"], "cosine")
    recipe = Recipe(
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_share=0.1,
        global_batch_size=options.global_batch_size,
        micro_batch_size=options.micro_batch_size,
        dtype=options.dtype,
        seed=options.seed,
    )
    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence("forward_kl", temperature=2.0), **weights)
    train(student, loss if spec["kd_weight"] else cross_entropy_loss, PackedRows(rows.train), eval_rows=None, recipe=recipe)


def held_out(student: Any, teacher: Any, folder: Path, dtype: Any) -> dict[str, float]:
    """Return the perplexity of both models on rows, and the student's divergence from the teacher in nats."""
    from ray_jobs.distillation.divergence import Divergence
    from ray_jobs.distillation.loss import DistillLoss
    from ray_jobs.distillation.targets import WorkerTeacher
    from ray_jobs.training.batches import PackedRows
    from ray_jobs.training.loop import evaluate

    loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence("forward_kl"))
    terms = evaluate(student, loss, PackedRows(folder), dtype=dtype)["terms"]
    return {"perplexity": math.exp(terms["ce"]), "teacher_perplexity": math.exp(terms["ce_teacher"]), "kl_nats": terms["kl"]}


def forward_speeds(student: Any, teacher: Any, *, length: int, turns: int = 5) -> dict[str, float]:
    """Return tokens a second of both models' forward pass with the head over one row, in turns; CPU time, or the GPU's."""
    import torch

    device = next(teacher.parameters()).device
    ids_BT = torch.randint(teacher.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[str, list[float]] = {"student": [], "teacher": []}
    with torch.no_grad():
        for turn in range(turns + 1):
            for name, model in (("student", student), ("teacher", teacher)):
                began = clock(device)
                model(input_ids=ids_BT, use_cache=False)
                if turn:  # the first warms up
                    seconds[name].append(clock(device) - began)
    return {name: length / statistics.median(each) for name, each in seconds.items()}


def clock(device: Any) -> float:
    import torch

    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def table(runs: list[dict[str, Any]]) -> str:
    """Return Markdown with the teacher first, each student after it, and whether KD beats the labels alone at equal tokens."""
    lines = [
        "| model | parameters, M | speed | perplexity, WikiText-2 | KL, WikiText-2 | perplexity, course | KL, course |",
        "|---|---|---|---|---|---|---|",
    ]
    if not runs:
        return "\n".join(lines)
    first = runs[0]
    perplexities = [f"{first[text]['teacher_perplexity']:.1f} | 0" for text in ("wikitext", "course")]
    lines.append(f"| teacher | {first['num_parameters']['teacher'] / 1e6:.1f} | 1.00 | {' | '.join(perplexities)} |")
    for run in runs:
        size, speed = (run[name]["student"] / run[name]["teacher"] for name in ("num_parameters", "speed"))
        shown = [f"{run[text]['perplexity']:.1f} | {run[text]['kl_nats']:.3f}" for text in ("wikitext", "course")]
        parameters = f"{run['num_parameters']['student'] / 1e6:.1f} ({size:.0%})"
        lines.append(f"| {run['row']}: {ROWS[run['row']]['what']} | {parameters} | {speed:.2f} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *verdict(runs)])


def verdict(runs: list[dict[str, Any]]) -> list[str]:
    """Return a line for each text that says whether KD beats plain cross-entropy at equal tokens."""
    by_row = {run["row"]: run for run in runs}
    if not {"ce-only", "triple", "without-hidden"} <= by_row.keys():
        return []
    lines = []
    for text in ("wikitext", "course"):
        labels, *taught = (by_row[row][text]["perplexity"] for row in ("ce-only", "triple", "without-hidden"))
        word = "beats" if max(taught) < labels else "does not beat" if min(taught) >= labels else "in one of its two forms beats"
        shown = " and ".join(f"{value:.1f}" for value in taught)
        lines.append(f"- {text}: KD {word} the labels alone at equal tokens: perplexity {shown} against {labels:.1f}")
    return lines


if __name__ == "__main__":
    main()
