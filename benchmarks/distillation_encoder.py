"""MiniLM-6 cut to 3 layers: what each part of the recipe is worth, at equal tokens; quality, size and speed against the teacher.

`python -m benchmarks.distillation_encoder --out FOLDER [--saf FOLDER] [--text FILE]`. Each finished row is kept in FOLDER/rows.jsonl
and not measured again, so that it may be run in pieces; `--print` shows the table. Figures: benchmarks/DISTILLATION_ENCODER.md.
Shapes: S texts, D width.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

COURSE = Path(__file__).parents[1] / "ray_jobs" / "datasets" / "os_course"
TEACHER = "minilm-l6"
ROW_TOKENS, CHUNK_TOKENS = 256, 64
ANSWERS_EACH = 25
QUESTION, ANSWER = 1, 2
"""Labels of a pair's texts; the distillation loss reads no label's value."""
NO_PAIR = 0
RECIPE = {"hidden": 1.0, "embedding": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "influence": {"layers": "influence"},
    "random": {"start": "random"},
    "no-hidden": {"weights": {"embedding": 1.0}},
    "no-embedding": {"weights": {"hidden": 1.0}},
    "no-kd": {"kd": False},
    "long": {"steps_factor": 4},
}
"""What each trained student changes of: layers evenly spaced, the teacher's start, both losses."""


def main() -> None:
    """Measure what is missing of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--saf", type=Path, help="folder of the SAF data set; its column stays empty without")
    parser.add_argument("--text", type=Path, help="further training text, such as wikitext-2's valid.txt")
    parser.add_argument("--text-tokens", type=int, default=60_000, help="how much of it")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=["teacher", "cut", "cut-influence", *VARIANTS, "speed"])
    parser.add_argument("--seed", type=int, default=0, help="of the rows' order and a random start; above 0 it stands in a row's name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", action="store_true", help="print the table of what is there, measure nothing")
    options = parser.parse_args()
    done = {row["name"]: row for row in _rows(options.out)}
    if not options.print:
        import torch

        torch.set_num_threads(options.threads)
        options.out.mkdir(parents=True, exist_ok=True)
        wanted = {name: name + (f"-seed{options.seed}" if options.seed else "") for name in options.only}
        for name, label in ((name, label) for name, label in wanted.items() if label not in done):
            began = time.monotonic()
            row = {"name": label, **_measure(name, options, options.out / label), "seconds": round(time.monotonic() - began, 1)}
            with (options.out / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print(table(_rows(options.out)))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, each beside its share of the teacher's."""
    teacher = next(row for row in rows if row["name"] == "teacher")
    measures = [name for name in ("mrr_at_10", "recall_at_1", "saf_spearman") if name in teacher]
    lines = ["| student | layers | tokens | " + " | ".join(measures) + " |", "|---" * (3 + len(measures)) + "|"]
    for row in (row for row in rows if "mrr_at_10" in row):
        cells = [f"{row[name]:.3f} ({row[name] / teacher[name]:.1%})" for name in measures]
        lines.append(f"| {row['name']} | {row['layers']} | {row['tokens']:,} | " + " | ".join(cells) + " |")
    lines += [json.dumps(row) for row in rows if "mrr_at_10" not in row]
    return "\n".join(lines)


def _rows(out: Path) -> list[dict[str, Any]]:
    file = out / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _measure(name: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    from ray_jobs.core.models import resolve_model

    if name == "speed":
        return _speed(options.out)
    if name == "teacher":
        return {"layers": "all 6", "tokens": 0, **_quality(resolve_model(TEACHER), options)}
    return _student(name, options, out)


def _student(name: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Train (or only cut) a student, export it, and measure the exported folder."""
    import torch

    from ray_jobs.core.models import resolve_model
    from ray_jobs.distillation.encoders.load import load_encoder
    from ray_jobs.distillation.encoders.student import cut_student, export_encoder, prepare_student
    from ray_jobs.distillation.layers import choose_layers
    from ray_jobs.training.loop import train
    from ray_jobs.training.recipe import Recipe

    folder = resolve_model(TEACHER)
    if (out / "trained.json").exists():  # by a run that ended before it had measured it
        return {**json.loads((out / "trained.json").read_text()), **_quality(out, options)}
    change = VARIANTS.get(name, {"layers": "influence"} if name == "cut-influence" else {})
    teacher = load_encoder(folder, "embedding", dtype=torch.float32)
    rows = _packed(options, folder)
    layers = _by_influence(teacher, rows, 3) if change.get("layers") else choose_layers(6, 3)
    torch.manual_seed(options.seed)
    student = prepare_student(cut_student(teacher, layers, start=change.get("start", "teacher")), task="embedding")
    progress = None
    if name in VARIANTS:
        steps = options.steps * change.get("steps_factor", 1)
        recipe = Recipe(max_steps=steps, learning_rate=3e-4, global_batch_size=8, micro_batch_size=8, seed=options.seed)
        progress = train(student, _loss(teacher, layers, change), rows, eval_rows=None, recipe=recipe)
    export_encoder(student, out, teacher_folder=folder, task="embedding")
    tokens, last = (progress.tokens, progress.log[-1]["terms"]) if progress else (0, {})
    facts = {"layers": str(layers), "tokens": tokens, "last_terms": last}
    (out / "trained.json").write_text(json.dumps(facts))
    return facts | _quality(out, options)


def _loss(teacher: Any, layers: list[int], change: dict[str, Any]) -> Any:
    from ray_jobs.distillation.encoders.loss import EncoderLoss, Weights

    if not change.get("kd", True):
        return _contrastive
    weights = Weights(**change.get("weights", RECIPE))
    return EncoderLoss(teacher, task="embedding", weights=weights, hidden_loss="mse", pairs=list(enumerate(layers)))


def _contrastive(model: Any, batch: Any) -> Any:
    """The loss without a teacher: each question finds its own answer among all texts of the micro-batch.

    Source:
        Henderson et al. 2017, arXiv:1705.00652 (in-batch negatives); scale 20 as sentence-transformers has it.
    """
    import torch
    import torch.nn.functional as F

    from ray_jobs.distillation.encoders.load import hidden_states
    from ray_jobs.distillation.encoders.texts import mean_pool, texts_of
    from ray_jobs.training.losses import LossSums

    texts = texts_of(batch)
    embedded_SD = F.normalize(mean_pool(hidden_states(model, batch)[0], texts), dim=-1)
    (asked,) = torch.nonzero(texts.labels_N == QUESTION, as_tuple=True)
    scores = 20 * embedded_SD[asked] @ embedded_SD.T
    scores = scores.scatter(1, asked[:, None], float("-inf"))
    total = F.cross_entropy(scores, asked + 1, reduction="sum") if len(asked) else embedded_SD.sum() * 0
    return LossSums(total, {"contrastive": total.detach()})


def _packed(options: argparse.Namespace, folder: Path) -> Any:
    """Return the course's chunks and pairs (and further text) as packed rows; the evaluation's sample answers are left out."""
    from ray_jobs.corpus.packing import pack, packed_row
    from ray_jobs.corpus.plain_texts import PlainTexts
    from ray_jobs.corpus.template import Encoded
    from ray_jobs.training.batches import PackedRows

    target = options.out / "rows"
    if not (target / "part-0.parquet").exists():
        import pyarrow as pa
        import pyarrow.parquet as pq

        encoder = PlainTexts(folder, task="embedding", max_length=ROW_TOKENS)
        examples: list[tuple[str, Encoded]] = _course(encoder) + (_further(encoder, options) if options.text else [])
        groups = pack([len(encoded.input_ids) for _, encoded in examples], ROW_TOKENS)
        rows = [packed_row([examples[i][0] for i in group], [examples[i][1] for i in group]) for group in groups]
        target.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), target / "part-0.parquet")
    return PackedRows(target)


def _course(encoder: Any) -> list[Any]:
    from ray_jobs.corpus.examples import Example, document_examples, pair_examples
    from ray_jobs.corpus.files import InputFile
    from ray_jobs.corpus.leaks import drop_leaks, reference_runs
    from ray_jobs.corpus.pairs import read_questions

    asked = reference_runs(read_questions(_input(InputFile, COURSE / "questions.jsonl")))
    found = [
        example
        for file in sorted((COURSE / "lectures").glob("*.md"))
        for example in document_examples(_input(InputFile, file), template=encoder, chunk_tokens=CHUNK_TOKENS)
    ]
    found += list(pair_examples(_input(InputFile, COURSE / "pairs.jsonl"), template=encoder, max_length=ROW_TOKENS))
    kept = [item for item in drop_leaks(found, asked) if isinstance(item, Example)]
    return [(item.example_id, _marked(item.encoded) if item.kind == "pair" else item.encoded) for item in kept]


def _input(kind: Any, path: Path) -> Any:
    return kind(str(path), str(path))


def _marked(encoded: Any) -> Any:
    """Return a pair with its texts told apart by their labels."""
    ends = list(itertools.accumulate(encoded.segment_lengths))
    labels = list(encoded.labels)
    labels[ends[0] - 1], labels[ends[1] - 1] = QUESTION, ANSWER
    return encoded._replace(labels=labels)


def _further(encoder: Any, options: argparse.Namespace) -> list[Any]:
    found, tokens = [], 0
    for number, line in enumerate(options.text.read_text(encoding="utf-8").splitlines()):
        for sentence in line.replace(" @-@ ", "-").split(" . "):
            if len(sentence.split()) > 4 and tokens < options.text_tokens:
                encoded = encoder.encode_text(sentence.strip())
                tokens += len(encoded.input_ids)
                found.append((f"{number}", encoded))
    return found


def _by_influence(teacher: Any, rows: Any, count: int) -> list[int]:
    from ray_jobs.distillation.encoders.influence import measure_encoder_influence
    from ray_jobs.distillation.influence import influence_table, most_influential

    found = measure_encoder_influence(teacher, rows, seed=0)
    layers = most_influential(found["influence"], count)
    print("\n".join(influence_table(found, layers)), flush=True)
    return layers


def _quality(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from benchmarks.encoder_measures import grade_correlation, read_saf, retrieval
    from ray_jobs.judging.encoder import SentenceEncoder

    encode = SentenceEncoder(folder)
    questions = [json.loads(line) for line in (COURSE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    found = retrieval(encode, [row["question"] for row in questions], [row["reference"] for row in questions])
    return found | (grade_correlation(encode, read_saf(options.saf, answers_each=ANSWERS_EACH)) if options.saf else {})


def _speed(out: Path) -> dict[str, Any]:
    """Return sentences a second of the teacher and of a 3-layer student on the 100 questions, interleaved, 2 threads."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from ray_jobs.core.models import resolve_model

    torch.set_num_threads(2)
    folders = {"teacher": resolve_model(TEACHER), "student": out / "cut"}
    models = {name: AutoModel.from_pretrained(folder).eval() for name, folder in folders.items()}
    tokenizer = AutoTokenizer.from_pretrained(folders["teacher"])
    questions = [json.loads(line)["question"] for line in (COURSE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {"parameters": {name: _sizes(model) for name, model in models.items()}}
    for batch_size, count in ((1, 16), (32, 64)):
        parts = [questions[start : start + batch_size] for start in range(0, count, batch_size)]
        inputs = [tokenizer(part, padding=True, return_tensors="pt") for part in parts]
        rates: dict[str, list[float]] = {name: [] for name in models}
        for _, (name, model) in itertools.product(range(7), models.items()):
            rates[name].append(count / _seconds(model, inputs))
        ratios = [student / teacher for student, teacher in zip(rates["student"][2:], rates["teacher"][2:], strict=True)]
        found[f"batch_{batch_size}"] = {name: round(statistics.median(values[2:]), 1) for name, values in rates.items()}
        found[f"batch_{batch_size}"] |= {
            "ratio": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
        }
    return found


def _seconds(model: Any, inputs: list[Any]) -> float:
    import torch

    began = time.perf_counter()
    with torch.inference_mode():
        for batch in inputs:
            model(**batch)
    return time.perf_counter() - began


def _sizes(model: Any) -> dict[str, int]:
    layers = sum(parameter.numel() for parameter in model.encoder.parameters())
    return {"all": sum(parameter.numel() for parameter in model.parameters()), "layers": layers}


if __name__ == "__main__":
    main()
