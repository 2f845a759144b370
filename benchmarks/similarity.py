"""Pooling in one product against gensim's loop, and every similarity against human grades: python -m benchmarks.similarity DATA.

DATA (or $SAF_DATA) is the folder `data` of the SAF short-answer set (github.com/SebOchs/SAF, MIT): a university course on
communication networks in English, training for micro-jobs in German; questions, sample answers, graded answers.
"""

import argparse
import os
import statistics
import time
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ray_jobs.core.models import resolve_model
from ray_jobs.judging.course_vectors import sentences, train
from ray_jobs.judging.coverage import Encode, cover, statements
from ray_jobs.judging.encoder import SentenceEncoder
from ray_jobs.judging.pooling import pool, unit, words
from ray_jobs.judging.rates import Rate, clustered_rate
from ray_jobs.judging.similarity import METRICS, score_answers
from ray_jobs.judging.vectors import load_vectors

Row = dict[str, Any]
SPEED_PAIRS = 1000
TURNS = 5
GLOVE = "glove-6b-50d"
ENCODER, THRESHOLD = "minilm-l6", 0.6
"""The coverage judge's defaults."""


def read(folder: Path, language: str) -> tuple[list[Row], list[Row]]:
    """Return Question rows and graded Answer rows of all splits; a question's first sample answer counts."""
    questions: dict[str, Row] = {}
    answers = []
    for path in sorted(folder.glob(f"*/{language}/*.xml")):
        root = ET.parse(path).getroot()
        id_ = " ".join((root.findtext("questionText") or "").split())  # two questions of the set share one id
        reference = next((node.text or "" for node in root.iter("referenceAnswer")), "")
        questions.setdefault(id_, {"question_id": id_, "reference": reference, "language": {"english": "en", "german": "de"}[language]})
        for node in root.iter("studentAnswer"):
            row = {"question_id": id_, "answer_id": str(len(answers)), "model": "student", "finish_reason": "stop"}
            answers.append({**row, "text": (node.findtext("response") or "").strip(), "grade": float(node.findtext("score") or "nan")})
    return list(questions.values()), [row for row in answers if row["text"] and not np.isnan(row["grade"])]


def speed(questions: list[Row], answers: list[Row]) -> str:
    """Return a line: pairs a second of gensim's `n_similarity` pair by pair and of one product, from the same tokens."""
    vectors = load_vectors(GLOVE).keyed
    place = {row["question_id"]: i for i, row in enumerate(questions)}
    references = [words(row["reference"]) for row in questions]
    chosen = [row for row in answers if any(word in vectors for word in words(row["text"]))][:SPEED_PAIRS]
    tokens, right = [words(row["text"]) for row in chosen], np.array([place[row["question_id"]] for row in chosen])
    ratios, ours_s, loops_s, difference = [], [], [], 0.0
    for _ in range(TURNS):
        start = time.process_time()
        by_pair = np.array([vectors.n_similarity(text, references[r]) for text, r in zip(tokens, right, strict=True)])
        loop_s = time.process_time() - start
        start = time.process_time()
        at_once = np.sum(unit(pool(tokens, vectors).mean_ND) * unit(pool(references, vectors).mean_ND)[right], axis=1)
        one_s = time.process_time() - start
        ratios.append(loop_s / one_s)
        loops_s.append(loop_s)
        ours_s.append(one_s)
        difference = max(difference, float(np.abs(by_pair - at_once).max()))
    rates = [f"{len(tokens) / statistics.median(found):,.0f} pairs a second" for found in (loops_s, ours_s)]
    sizes = np.mean([len(text) for text in tokens]), np.mean([len(references[r]) for r in right])
    return (
        f"{len(tokens)} pairs of {sizes[0]:.0f} and {sizes[1]:.0f} words, "
        f"CPU time, {TURNS} turns: n_similarity {rates[0]}, one product {rates[1]}, ratio {statistics.median(ratios):.0f} "
        f"({min(ratios):.0f} to {max(ratios):.0f}), largest difference {difference:.1e}"
    )


def ranks_grades(values: dict[str, float | None], answers: list[Row]) -> Rate:
    """Return how often, of two answers to one question with different grades, the better graded has the higher value."""
    by_question: dict[str, list[tuple[float, float]]] = {}
    for row in answers:
        value = values[row["answer_id"]]
        if value is not None:
            by_question.setdefault(row["question_id"], []).append((row["grade"], value))
    won, played = [], []
    for graded in by_question.values():
        pairs = [(x, y) if x[0] > y[0] else (y, x) for x, y in combinations(graded, 2) if x[0] != y[0]]
        won.append(sum(1.0 if better[1] > worse[1] else 0.5 * (better[1] == worse[1]) for better, worse in pairs))
        played.append(len(pairs))
    return clustered_rate(won, played)


def coverage(questions: list[Row], answers: list[Row], encode: Encode) -> str:
    """Return a line: how the coverage judge's score ranks grades, and its mean to the own and to another question's sample answer."""
    parts = {text: statements(text) for text in {row["text"] for row in answers} | {row["reference"] for row in questions}}
    distinct = sorted({statement for said in parts.values() for statement in said}, key=lambda said: (len(said), said))
    vectors = dict(zip(distinct, encode(distinct), strict=True))
    embedded = {text: np.stack([vectors[statement] for statement in said]) for text, said in parts.items()}

    def score(reference: str, text: str) -> float:
        return cover(embedded[reference], embedded[text], threshold=THRESHOLD).score

    place = {row["question_id"]: i for i, row in enumerate(questions)}
    right = [place[row["question_id"]] for row in answers]
    own = [score(questions[r]["reference"], row["text"]) for row, r in zip(answers, right, strict=True)]
    # of every answer, the sample answer of the question after its own
    wrong = [score(questions[(r + 1) % len(questions)]["reference"], row["text"]) for row, r in zip(answers, right, strict=True)]
    rate = ranks_grades({row["answer_id"]: value for row, value in zip(answers, own, strict=True)}, answers)
    rho = stats.spearmanr(own, [len(words(row["text"])) for row in answers]).statistic
    return (
        f"coverage judge: ranks grades right {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}], rho with length {rho:.2f}, "
        f"own sample answer {np.mean(own):.3f}, another's {np.mean(wrong):.3f}"
    )


def table(questions: list[Row], answers: list[Row], vectors: Any, *, floor: float) -> str:
    """Return a Markdown table: each metric's ranking of grades, its correlation with length, right and wrong sample answers."""
    rows, scales = score_answers(questions, answers, vectors, min_known_share=floor)
    lines = ["| metric | ranks grades right | answers | rho with length | own sample answer | another's |", "|---|---|---|---|---|---|"]
    lengths = {row.answer_id: float(row.num_tokens) for row in rows}
    for metric in (*METRICS, "length"):
        values = {row.answer_id: getattr(row, metric) if metric != "length" else lengths[row.answer_id] for row in rows}
        scored = [id_ for id_, value in values.items() if value is not None]
        if not scored:
            lines.append(f"| {metric} | - | 0 | - | - | - |")
            continue
        rate = ranks_grades(values, answers)
        rho = stats.spearmanr([values[id_] for id_ in scored], [lengths[id_] for id_ in scored]).statistic
        scale = [f"{scales[metric].right_mean:.3f}", f"{scales[metric].wrong_mean:.3f}"] if metric in scales else ["-", "-"]
        lines.append(f"| {metric} | {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] | {len(scored)} | {rho:.2f} | {' | '.join(scale)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the speed line and a table for each language and kind of vectors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default=os.environ.get("SAF_DATA"), help="folder `data` of SAF; else $SAF_DATA")
    parser.add_argument("--floor", type=float, default=0.5, help="share of words with a vector that a cosine needs")
    options = parser.parse_args()
    if not options.data or not Path(options.data).is_dir():
        raise SystemExit(f"no SAF data at {options.data!r}: give its folder `data` as argument or in SAF_DATA (github.com/SebOchs/SAF)")
    for language in ("english", "german"):
        questions, answers = read(Path(options.data), language)
        if language == "english":
            print(speed(questions, answers), flush=True)
        print(f"\n{language}, {coverage(questions, answers, SentenceEncoder(resolve_model(ENCODER)))}", flush=True)
        own = train(sentences([row["reference"] for row in questions] + [row["text"] for row in answers]), seed=0)
        for name, vectors in ((GLOVE, load_vectors(GLOVE).keyed), ("trained on these texts", own)):
            print(f"\n{language}, {len(questions)} questions, {len(answers)} answers, vectors: {name}\n")
            print(table(questions, answers, vectors, floor=options.floor), flush=True)


if __name__ == "__main__":
    main()
