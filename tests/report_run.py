"""Writes a run folder as the stages would leave it, from given texts: finished stages without their work."""

import math
import random

from ray_jobs.core.config_file import validate
from ray_jobs.core.records import Answer, Question, Similarity, content_id
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.judging.pairs import Ruling, make_games, verdict_row
from ray_jobs.judging.results import compare_models, describe_judge, rank_models
from ray_jobs.reporting.run_files import RunFiles

AFTER = {
    "prepare": [],
    "finetune": ["prepare"],
    "distill": ["finetune"],
    "answer": ["distill"],
    "judge": ["answer"],
    "compress": ["distill"],
}
MODELS = ("base", "teacher", "student")
PAIRS = [("base", "teacher"), ("teacher", "student")]
TIE_BAND = 0.0005
COUNTS = {"documents": 16, "chunks": 214, "pairs": 431, "train_rows": 182, "eval_rows": 21, "train_tokens": 91_002}
SHARES = {"data": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "other": 0.04, "communication": 0.12}
MEMORY = {
    "peak_bytes": [1_900_000_000, 1_850_000_000],
    "gpu_peak_bytes": [0, 0],
    "memory": {"host": {"limit_bytes": 17_179_869_184, "predicted_bytes": 1_800_000_000}},
}
"""The distilling stage stands for one of an older version, which measured none of this."""
COMPRESSION = [
    ("base", "transformers", "float32", 538_000_000, 21.0, 2.740, None),
    ("teacher", "transformers", "float32", 538_000_000, 20.6, 2.312, None),
    ("student", "transformers", "float32", 396_000_000, 31.2, 2.710, 0.0),
    ("torch-int8", "torch", "int8", 212_000_000, 44.9, 2.734, 0.011),
    ("openvino-fp32", "openvino", "float32", 396_000_000, 52.3, 2.710, 0.0),
    ("openvino-int8", "openvino", "int8", 134_500_000, 88.4, 2.716, 0.004),
    ("onnx-int8", "onnxruntime", "int8", 139_000_000, 79.0, 2.741, 0.017),
]


def config_of(storage):
    return validate({"run": {"name": "house", "storage": str(storage)}})


def make_questions(count):
    topics = ("memory", "scheduling", "big_data")
    return [
        {
            "question": f"What does part {i} of a kernel keep?",
            "reference": f"It keeps record {i}. It answers in order.",
            "topic": topics[i % 3],
            "language": "de" if i % 8 == 7 else "en",
        }
        for i in range(count)
    ]


def plain_answer(question, model, ordinal):
    return f"The {model} says about part {ordinal}: it keeps {'a record' if ordinal % 2 else 'nothing'}."


def write_run(storage, questions, *, answer_of=plain_answer, judges=("coverage",), stages=tuple(AFTER), seed=0, measured=False):
    """Finish `stages` of a run over the questions and return its RunFolder.

    Args:
        answer_of: called with (question row, model, ordinal); returns the answer's text.
        judges: names in the rows; human labels the first third of the questions, in one order.
        measured: write the judge stage's own statistics too, as it does today; older runs lack them.
    """
    folder = RunFolder(config_of(storage))
    rows = [Question(question_id=content_id(q["question"]), **q).model_dump() for q in questions]
    answers = {model: [_answer(q, model, answer_of(q, model, i), i) for i, q in enumerate(rows)] for model in MODELS}
    for name in stages:
        after = [stage for stage in AFTER[name] if stage in stages]
        stage = folder.stage(name, sections=["data" if name == "prepare" else name], after=after, force=False)
        write = {"prepare": _prepare, "answer": _answers, "judge": _judge, "compress": _compress}.get(name, _train)
        stage.finish(**write(stage, rows=rows, answers=answers, judges=judges, draw=random.Random(seed), measured=measured))
    return folder


def many_questions(count):
    """Return the RunFiles of base and teacher on `count` questions with answers of some 60 words and one judge, without a folder."""
    draw = random.Random(0)
    rows = [{"question_id": content_id(q["question"]), **q} for q in make_questions(count)]
    pair, answers, similarities, verdicts = MODELS[:2], {"base": {}, "teacher": {}}, [], []
    for i, row in enumerate(rows):
        id_ = row["question_id"]
        for model in pair:
            text = f"The {model} says about part {i} in words such as these: " + "it keeps a record and answers in order. " * 6
            answers[model][id_] = {
                "answer_id": f"{id_} {model}",
                "text": text,
                "finish_reason": "stop",
                "error": "",
                "completion_tokens": 60,
            }
            scores = {
                "cosine": draw.gauss(0.93, 0.004),
                "sif_cosine": 0.3,
                "token_f1": 0.2,
                "oov_share": 0.0,
                "reason": "",
                "num_tokens": i % 90,
            }
            similarities.append({"answer_id": f"{id_} {model}", "question_id": id_, "model": model, **scores})
        winner = draw.choice(["a", "b", "tie", None])
        said = {"question_id": id_, "model_a": pair[0], "model_b": pair[1], "judge": "openai:stub", "winner": winner, "repeat": 0}
        said |= {"answer_a": f"{id_} base", "answer_b": f"{id_} teacher", "explanation": "Answer 1 covers 2 of 3 statements. " * 4}
        said |= {
            "unscored": "" if winner else "no reply",
            "rubric_sha": "5a",
            "prompt_tokens": 300,
            "completion_tokens": 90,
            "cost_usd": None,
            "raw": "{}",
        }
        verdicts += [said | {"swapped": False}, said | {"swapped": True}]
    stage = {"settings": {}}
    manifests = {"prepare": stage, "answer": stage, "judge": {**stage, "similarity": {"tie_band": TIE_BAND}}}
    empty = {"finetune_steps": [], "distill_steps": [], "compression": []}
    found = {"questions": rows, "answers": answers, "similarities": similarities, "verdicts": verdicts}
    return RunFiles(name="house", provenance={}, manifests=manifests, **found, **empty)


def _answer(question, model, text, i):
    return Answer(
        answer_id=content_id(question["question_id"], model, text),
        question_id=question["question_id"],
        model=model,
        text=text,
        finish_reason="length" if i % 9 == 4 else "stop",
        prompt_tokens=30,
        completion_tokens=len(text.split()),
        latency_s=0.25,
    ).model_dump()


def _prepare(stage, *, rows, **_):
    stage.folder.write_jsonl("questions.jsonl", rows)
    return {"counts": {**COUNTS, "questions": len(rows), "dropped": {"near duplicate": 7, "longer than max_length": 2}}}


def _train(stage, **_):
    if stage.name == "finetune":
        stage.folder.write_jsonl("metrics.jsonl", _steps(2.74, 2.31, 40, {"ce": 1.0}, timed=True))
        return {"eval": {"base_nats": 2.7401, "teacher_nats": 2.3123}, **MEMORY}
    stage.folder.write_jsonl("metrics.jsonl", _steps(1.9, 0.6, 50, {"kl": 1.0, "ce": 2.1}))
    nats = {"kl_before_nats": 1.93, "kl_after_nats": 0.41, "ce_teacher_nats": 2.3123, "ce_before_nats": 4.02, "ce_after_nats": 2.71}
    return {"eval": nats}


def _steps(start, end, count, shares, *, timed=False):
    figures = {"shares": SHARES, "tokens_per_s": 640.0, "tokens_per_s_per_worker": 320.0} if timed else {}

    def line(step, loss, prefix=""):
        terms = {term: loss * share for term, share in shares.items()}
        return {"step": step, "tokens": 512 * step, f"{prefix}loss": loss, f"{prefix}terms": terms}

    losses = [end + (start - end) * math.exp(-4 * i / count) * (1 + 0.05 * math.sin(7 * i)) for i in range(count)]
    trained = [line(i, loss) | figures for i, loss in enumerate(losses, start=1)]
    return [line(0, start, "eval_"), *trained, line(count, end, "eval_")]


def _answers(stage, *, answers, **_):
    for model, found in answers.items():
        stage.folder.write_parquet(f"{model}.parquet", found)
    return {}


def _judge(stage, *, rows, answers, judges, draw, measured):
    flat = [answer for found in answers.values() for answer in found]
    german = {row["question_id"] for row in rows if row["language"] == "de"}
    similarities = [_similarity(answer, draw, answer["question_id"] in german) for answer in flat]
    stage.folder.write_parquet("similarities.parquet", similarities)
    verdicts = _verdicts(make_games(rows, answers, PAIRS), judges, draw)
    stage.folder.write_parquet("verdicts.parquet", verdicts)
    similarity = {"vectors": "glove-6b-50d", "right_mean": 0.9304, "wrong_mean": 0.8961, "spread": 0.05, "tie_band": TIE_BAND}
    told = [{"name": judge, **({} if judge in ("human", "jury") else {"model": "minilm-l6"})} for judge in judges]
    if not measured:
        return {"judges": told, "similarity": similarity}
    human = "human" if "human" in judges else None
    cards = {j: describe_judge(verdicts, j, similarities, seed=0, human=human if j != human else None) for j in judges}
    return {
        "judges": [{**entry, "card": cards[entry["name"]]} for entry in told],
        "similarity": similarity | {"scales": {"cosine": similarity}},
        "pairs": compare_models(PAIRS, list(judges), verdicts, similarities, tie_bands={"cosine": TIE_BAND}, seed=0),
        "ranking": {judge: rank_models(verdicts, judge, seed=0) for judge in judges},
    }


def _verdicts(games, judges, draw):
    verdicts = []
    for judge in judges:
        for i, (first, second) in enumerate(zip(games[::2], games[1::2], strict=True)):
            winner = draw.choices(["a", "b", "tie", None], weights=[42, 46, 10, 2])[0]
            other = winner if draw.random() > 0.1 or winner is None else "tie"
            if judge != "human":
                said = ((first, winner), (second, other))
                verdicts += [verdict_row(game, _ruling(won, game), judge=judge, rubric_sha="5a" * 8) for game, won in said]
            elif i < len(games) / 6:
                verdicts.append(verdict_row(first, Ruling(winner or "tie"), judge=judge, rubric_sha=""))
    return verdicts


def _ruling(winner, game):
    if winner is None:
        return Ruling(None, unscored="the reply named no winner")
    second = 3 if winner == "b" else 1
    return Ruling(winner, f"Answer 1 covers 2 of 3 statements.\nMissing: {game.reference[:80]}\nAnswer 2 covers {second} of 3.")


def _similarity(answer, draw, is_german):
    cosine = None if is_german or draw.random() < 0.03 else draw.gauss(0.93, 0.004)
    return Similarity(
        answer_id=answer["answer_id"],
        question_id=answer["question_id"],
        model=answer["model"],
        cosine=cosine,
        sif_cosine=None if cosine is None else draw.uniform(0.2, 0.7),
        token_f1=draw.uniform(0.1, 0.5),
        oov_share=draw.uniform(0, 0.2),
        num_tokens=answer["completion_tokens"],
        reason="" if cosine else "12% of the answer's words have a vector, fewer than 50%",
    ).model_dump()


def _compress(stage, **_):
    keys = ("name", "engine", "precision", "size_bytes", "tokens_per_s", "loss_nats", "kl_nats")
    measured = {
        "device": "cpu",
        "threads": 2,
        "num_answers": 12,
        "new_tokens": 48,
        "load_s": 0.8,
        "first_token_s": 0.05,
        "answer_p50_s": 1.1,
    }
    stage.folder.write_json(
        "table.json", [{**dict(zip(keys, row, strict=True)), **measured, "speedup": row[4] / 31.2} for row in COMPRESSION]
    )
    return {}
