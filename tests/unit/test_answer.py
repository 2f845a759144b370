import functools

import pytest

from ray_jobs.answer import AnswerBatch, check, make_batches
from ray_jobs.core.errors import ConfigError, DataError
from ray_jobs.core.memory import reset_peak
from ray_jobs.core.records import Answer
from serve.engines import Completion


class OneBadChat:
    """Fails whenever the chat that says "bad" is among those it gets."""

    def __init__(self):
        self.sizes = []

    def generate(self, chats, *, max_new_tokens, sampling_temperature, seed):
        self.sizes.append(len(chats))
        if any(chat[-1]["content"] == "bad" for chat in chats):
            raise RuntimeError("no memory left")
        return [Completion(chat[-1]["content"].upper(), "stop", 3, 2) for chat in chats]


def questions(*texts):
    return [{"question_id": f"q-{text}", "question": text} for text in texts]


def answer(texts, engine=None):
    batch = make_batches(questions(*texts), size=99, system_prompt="", seed=0)[0]
    options = {"max_new_tokens": 5, "sampling_temperature": 0.0, "memory_bytes": 2**40}
    worker = AnswerBatch(make_engine={"base": lambda: engine or OneBadChat()}, **options)
    return worker({"model": "base", **batch})["answers"]


def test_batches_hold_each_question_once_by_length_and_never_change():
    texts = ["x" * (i * 7 % 11 + 1) + str(i) for i in range(11)]
    batches = make_batches(questions(*texts), size=4, system_prompt="Be brief.", seed=3)
    chats = [item["chat"] for batch in batches for item in batch["chats"]]
    asked = [chat[1]["content"] for chat in chats]
    assert [len(batch["chats"]) for batch in batches] == [4, 4, 3]
    assert sorted(asked) == sorted(texts)
    assert list(map(len, asked)) == sorted(map(len, asked))
    assert chats[0][0] == {"role": "system", "content": "Be brief."}
    assert batches == make_batches(questions(*reversed(texts)), size=4, system_prompt="Be brief.", seed=3)
    assert len({batch["seed"] for batch in batches}) == 3


def test_answers_are_records_with_counts_and_share_of_the_seconds():
    rows = answer(["why", "how"])
    records = [Answer.model_validate(row) for row in rows]
    assert [(row.question_id, row.text, row.finish_reason) for row in records] == [("q-how", "HOW", "stop"), ("q-why", "WHY", "stop")]
    assert records[0].latency_s == records[1].latency_s >= 0
    assert (records[0].prompt_tokens, records[0].completion_tokens) == (3, 2)
    assert records[0].answer_id != records[1].answer_id


def test_a_failed_answer_is_a_row_with_its_reason_and_the_others_are_answered():
    engine = OneBadChat()
    rows = {row["question_id"]: Answer.model_validate(row) for row in answer(["why", "bad", "how"], engine)}
    assert rows["q-bad"].finish_reason == "error"
    assert rows["q-bad"].error == "RuntimeError: no memory left"
    assert (rows["q-bad"].text, rows["q-bad"].completion_tokens) == ("", 0)
    assert [rows[f"q-{text}"].text for text in ("why", "how")] == ["WHY", "HOW"]
    assert engine.sizes == [3, 1, 1, 1]


def test_a_worker_loads_each_model_once_and_holds_one_at_a_time():
    loaded = []

    def load(name):
        loaded.append(name)
        return OneBadChat()

    makers = {name: functools.partial(load, name) for name in ("base", "student")}
    worker = AnswerBatch(make_engine=makers, max_new_tokens=5, sampling_temperature=0.0, memory_bytes=2**40)
    batches = make_batches(questions("why", "how"), size=1, system_prompt="", seed=0)
    made = [worker({"model": model, **batch}) for model in makers for batch in batches]
    assert loaded == ["base", "student"]
    assert [row["model"] for result in made for row in result["answers"]] == ["base", "base", "student", "student"]


def test_nothing_to_answer_is_refused_before_any_work(tiny_config):
    with pytest.raises(ConfigError, match="name at least one"):
        check(tiny_config(answer__models=[]))
    with pytest.raises(DataError, match="questions is not set"):
        check(tiny_config(data__questions=None))


def test_peaks_say_whether_they_are_the_models_own():
    batch = make_batches(questions("why"), size=9, system_prompt="", seed=0)[0]
    worker = AnswerBatch(make_engine={"base": OneBadChat}, max_new_tokens=5, sampling_temperature=0.0, memory_bytes=2**40)
    made = worker({"model": "base", **batch})
    assert made["peak_bytes"] > 0
    assert made["peak_is_own"] == reset_peak()
