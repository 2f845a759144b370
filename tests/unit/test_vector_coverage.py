"""The floor `judge.min_known_share` parts the languages: the embedded vectors know English sample answers, not German ones."""

from pathlib import Path

from ray_jobs.core.config import JudgeSection
from ray_jobs.core.storage import Storage
from ray_jobs.judging.similarity import score_answers
from ray_jobs.judging.vectors import load_vectors

COURSE = Path(__file__).parents[2] / "ray_jobs" / "datasets" / "os_course"


def test_sample_answers_known_share_by_language():
    rows = Storage(str(COURSE)).read_jsonl("questions.jsonl")
    questions = [row | {"question_id": str(i)} for i, row in enumerate(rows)]
    common = {"model": "sample", "finish_reason": "stop"}
    answers = [
        {"answer_id": row["question_id"], "question_id": row["question_id"], "text": row["reference"], **common} for row in questions
    ]
    floor = JudgeSection().min_known_share
    scored, _ = score_answers(questions, answers, load_vectors("glove-6b-50d").keyed, min_known_share=floor)
    language = {row["question_id"]: row["language"] for row in questions}
    known = {code: [1 - row.oov_share for row in scored if language[row.question_id] == code] for code in ("en", "de")}
    assert min(known["en"]) >= 0.91
    assert max(known["de"]) <= 0.83 < floor
    assert all((row.cosine is None) == (language[row.question_id] == "de") for row in scored)
