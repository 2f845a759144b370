"""Answers written beforehand: paid once also by a driver that is killed, failed ones with their reason, packed like pairs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from judge_server import Fault, JudgeServer, completion

from ray_jobs.core.errors import ConfigError, EndpointError, JobError
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.packing import IGNORE
from ray_jobs.corpus.template import ChatTemplate
from ray_jobs.distillation.texts import (
    ANSWERS,
    KEPT,
    WriteTexts,
    batches_of,
    make_asks,
    text_loss,
    training_questions,
    write_rows,
    write_texts,
)
from ray_jobs.training.batches import PackedRows, collate
from ray_jobs.training.losses import cross_entropy_loss
from ray_jobs.training.models import load_model

NUM_PAIRS, IN_FLIGHT = 24, 2
SECTION = {"model": "teacher", "api_key_env": "TEXT_KEY", "max_new_tokens": 32, "sampling_temperature": 0.0, "max_concurrency": IN_FLIGHT}
DRIVER = f"""
import sys
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.template import ChatTemplate
from ray_jobs.distillation.texts import training_questions, write_texts
url, texts, prepared, model = sys.argv[1:]
section = {{**{SECTION!r}, "base_url": url}}
questions = training_questions(Storage(prepared), train_on_chunks=False, eval_share=0.0)
options = {{"template": ChatTemplate(model), "max_length": 256, "make_engine": None, "workers": None, "seed": 0}}
print(write_texts(section, Storage(texts), Storage(prepared), questions, **options)["answers"])
"""


@pytest.fixture
def prepared(tmp_path):
    """A folder as prepare leaves it, of pairs alone."""
    pairs = [{"pair_id": f"p{i}", "question": f"What is part {i}?", "answer": "-"} for i in range(NUM_PAIRS)]
    Storage(str(tmp_path / "prepared")).write_jsonl("pairs.jsonl", pairs)
    return tmp_path / "prepared"


def answered(number, request):
    question = request["messages"][-1]["content"]
    if question == "What is part 3?":
        return Fault(body=completion("It is cut", finish_reason="length"))
    return Fault(body=completion(f"The answer to: {question}"))


def start(url, tmp_path, prepared, model):
    command = [sys.executable, "-c", DRIVER, url, str(tmp_path / "texts"), str(prepared), str(model)]
    return subprocess.Popen(command, env={**os.environ, "TEXT_KEY": "secret"})


def write(url, texts, prepared, model, questions=None):
    options = {"template": ChatTemplate(model), "max_length": 256, "make_engine": None, "workers": None, "seed": 0}
    questions = questions or training_questions(Storage(str(prepared)), train_on_chunks=False, eval_share=0.0)
    return write_texts({**SECTION, "base_url": url}, Storage(str(texts)), Storage(str(prepared)), questions, **options)


def test_a_killed_driver_pays_nothing_twice_but_what_was_in_flight(tmp_path, prepared, tiny_model, monkeypatch):
    monkeypatch.setenv("TEXT_KEY", "secret")
    texts = Storage(str(tmp_path / "texts"))
    with JudgeServer(answered, latency_s=0.02).running() as server:
        driver = start(server.url, tmp_path, prepared, tiny_model)
        until = time.monotonic() + 120
        while len(server.requests) < 8 and time.monotonic() < until:
            time.sleep(0.005)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        before, kept = len(server.requests), len(texts.sub(KEPT).names())
        assert 8 <= before < NUM_PAIRS
        assert before - kept <= IN_FLIGHT
        assert write(server.url, tmp_path / "texts", prepared, tiny_model)["answers"] == NUM_PAIRS
        whole = len(server.requests)
        assert before <= whole <= before + NUM_PAIRS - kept  # fewer where a reply was in the ledger and its answer not yet read
        assert len({request["messages"][-1]["content"] for request in server.requests}) == NUM_PAIRS
        write(server.url, tmp_path / "texts", prepared, tiny_model)
        assert len(server.requests) == whole, "a finished folder asks nobody"
    rows = texts.read_jsonl(ANSWERS)
    assert [row["question"] for row in rows if row["error"]] == ["What is part 3?"]
    assert "max_new_tokens" in next(row["error"] for row in rows if row["error"])
    assert texts.read_json("counts.json")["failed"] == 1
    written = "".join(path.read_text() for path in (tmp_path / "texts").rglob("*.json*"))
    assert "secret" not in written
    check_rows(tmp_path / "texts" / "train", rows, tiny_model)


def check_rows(folder, rows, model):
    """Fail where the packed rows are not the usable answers as the template encodes them; their loss is plain cross-entropy."""
    packed, template = PackedRows(folder), ChatTemplate(model)
    encoded = [template.encode_pair(row["question"], row["text"]) for row in rows if not row["error"]]
    learnt = sorted(label for i in range(len(packed)) for label in packed[i].labels if label != IGNORE)
    assert learnt == sorted(token for example in encoded for token in example.input_ids[example.num_untrained :])
    model, batch = load_model(model, dtype=torch.float32), collate([packed[0]])
    assert text_loss(model, batch).terms["ce"] == cross_entropy_loss(model, batch).total


def test_an_endpoint_that_refuses_stops_the_job_and_a_failed_call_is_a_row_that_is_asked_again(tmp_path, prepared, tiny_model, monkeypatch):
    questions = training_questions(Storage(str(prepared)), train_on_chunks=False, eval_share=0.0)[:4]
    given = (tmp_path / "texts", prepared, tiny_model, questions)
    with pytest.raises(ConfigError, match="TEXT_KEY, which is not set"):
        write("http://127.0.0.1:9/v1", *given)
    monkeypatch.setenv("TEXT_KEY", "secret")
    with JudgeServer(lambda number, request: Fault(401)).running() as server, pytest.raises(EndpointError, match="what has come is kept"):
        write(server.url, *given)
    second = "What is part 1?"

    def refuse_one(number, request):
        return Fault(400) if request["messages"][-1]["content"] == second else answered(number, request)

    with JudgeServer(refuse_one).running() as server:
        assert write(server.url, *given)["failed"] == 2
    failed = [row for row in Storage(str(tmp_path / "texts")).read_jsonl(ANSWERS) if row["error"]]
    assert {row["question"] for row in failed} == {second, "What is part 3?"}


def test_a_model_of_our_own_answers_what_is_missing_and_held_out_questions_are_not_asked(tmp_path, prepared, tiny_model):
    from serve.engines import open_engine

    everything, trained = (training_questions(Storage(str(prepared)), train_on_chunks=False, eval_share=share) for share in (0.0, 0.3))
    assert 0 < len(trained) < len(everything) == NUM_PAIRS
    asks = make_asks(everything[:3], system_prompt="", writer={})
    kept = Storage(str(tmp_path / "texts" / KEPT))
    kept.write_json(f"{asks[0].key}.json", {"text": "Kept before.", "error": ""})
    worker = WriteTexts(
        make_engine=lambda: open_engine(str(tiny_model), dtype="float32", device="cpu"),
        kept=kept,
        options={"max_new_tokens": 4, "sampling_temperature": 0.0, "seed": 0},
        memory_bytes=2**34,
    )
    for item in batches_of(asks, kept, size=8):
        assert worker(json.loads(json.dumps(item))) == {"num": 2}
    texts = Storage(str(tmp_path / "texts"))
    counts = write_rows(asks, texts, ChatTemplate(tiny_model), max_length=256)
    assert counts["answers"] == 3
    assert texts.read_jsonl(ANSWERS)[0]["text"] == "Kept before."
    with pytest.raises(JobError, match=r"none of 3 answers can be trained on: [0-9]+ tokens, a row has 2"):
        write_rows(asks, texts, ChatTemplate(tiny_model), max_length=2)
